"""FSDP2 and every other layout made of DTensors."""
