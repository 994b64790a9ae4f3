"""Text environments (``gymnasium.Env``); importing ``tea_rl.envs`` registers them."""
