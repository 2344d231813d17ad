"""What every engine needs: scheduling, sampling, limits, constraints; a model runner adds the model."""
