"""Is code of our own needed for augmentation? The same views by gradscope and by kornia, timed in turn."""
