"""What can be seen of a distillation before and while it trains: layers, costs, schedules, gradients, scores, pictures."""
