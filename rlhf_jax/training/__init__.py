"""Floor 4: steps, rollouts, whole iterations, evaluation."""
