-- Queues accounts ($1) whose events may have been left out: Redis had forgotten that they are tracked.
UPDATE standpipe.repos SET state = 'queued', class = 1, reason = 'gap', requests = requests + 1, attempts = 0
WHERE did = ANY ($1) AND state <> 'queued'
