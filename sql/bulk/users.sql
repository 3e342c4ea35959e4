-- Gives these accounts ($1, sorted) a row, in a transaction of its own: two that write the same new accounts wait for
-- each other.
SELECT set_config('synchronous_commit', 'off', true), standpipe.ensure_users($1)
