"""Both stages on a live loop: begun, handed over, resumed, shown."""
