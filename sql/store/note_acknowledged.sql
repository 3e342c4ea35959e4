-- Notes what the group acknowledged, durably whatever the session commits.
WITH durable AS MATERIALIZED (SELECT set_config('synchronous_commit', 'on', true))
INSERT INTO standpipe.acknowledged AS a (stream, consumer_group, noted_ms, relay, epoch, position)
SELECT $1, $2, $3, $4, $5, $6 FROM durable
ON CONFLICT (stream, consumer_group) DO UPDATE SET
    noted_ms = excluded.noted_ms, relay = excluded.relay, epoch = excluded.epoch,
    position = excluded.position
WHERE a.noted_ms < excluded.noted_ms
