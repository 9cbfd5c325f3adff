"""What every stage needs: its command line, params.yaml, whole outputs, the record of a run."""
