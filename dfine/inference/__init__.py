"""A trained model in use: pages, pictures, COCO metrics."""
