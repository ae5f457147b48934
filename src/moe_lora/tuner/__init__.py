"""The PEFT method: configuration, model, adapted layers and their experts."""
