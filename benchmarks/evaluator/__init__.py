"""The fast evaluator beside the loop that one would write with transformers alone."""
