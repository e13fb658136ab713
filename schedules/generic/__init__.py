"""Any legalised PrimFunc that no family covers, scheduled by rules over its blocks."""
