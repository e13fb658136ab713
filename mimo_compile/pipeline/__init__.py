"""Model -> kernel graphs -> plan -> artifact."""
