-- Waits for the disk, and for a standby if commits are to wait for one. It must write something of its own: a transaction
-- that writes nothing flushes nothing.
SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
    WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true),
pg_logical_emit_message(true, 'standpipe', '')
