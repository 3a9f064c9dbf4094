"""The pipeline, one step per file; `entropy_probe.run` calls them in order, `SequenceProcessor` those up to scores.

tasks → rollouts → scores → gradients → (first order: ustat, two_batch)
                 update (v from the U batch) → slopes (E batch) → entropy_change → continuity, invariance
"""
