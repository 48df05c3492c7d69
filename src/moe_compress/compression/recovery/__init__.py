"""The engines of recovery: training end to end, and layer by layer beside the teacher."""
