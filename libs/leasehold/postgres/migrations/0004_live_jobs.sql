-- Jobs that have not ended, found by what does not change until they end.
--
-- The index of before was of states, which is what the flusher compares when it moves jobs that it knows by id: where
-- statistics told of few live jobs, as they do beside a long history, the planner went through all of the index for
-- each batch, dead entries too. And a job that starts now stays where it is in every index.

DROP INDEX job_live;
CREATE INDEX job_live ON job (queue) WHERE end_time IS NULL;
