"""The engine: text, observers, the fold over layers, the calibration artefact, surgery."""
