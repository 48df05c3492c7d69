"""The analysis people plan from: what experts do, how alike they are, which could go, and ExpertCompressor."""
