"""What the network learns from: matching, detection, self-distillation, and distillation from a teacher."""
