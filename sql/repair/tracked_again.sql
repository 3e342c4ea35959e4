-- Queues accounts ($1) whose events may have been left out: Redis had forgotten that they are tracked.
UPDATE standpipe.repos SET
    state = 'queued', class = least(1, CASE state WHEN 'queued' THEN class END),
    reason = CASE state WHEN 'queued' THEN reason ELSE 'gap' END,
    requests = requests + 1, attempts = CASE state WHEN 'queued' THEN attempts ELSE 0 END
WHERE did = ANY ($1)
