"""Files, clocks and processes: what every floor may use and what knows nothing of cascades."""
