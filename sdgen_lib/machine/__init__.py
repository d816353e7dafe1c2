"""What the computer offers: devices, number formats, compiling, memory, parallel work, seeds."""
