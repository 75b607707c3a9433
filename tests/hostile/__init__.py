"""The table of wrong uses: each with its clear error or its defined outcome."""
