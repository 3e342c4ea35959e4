-- A deletion whose account's rows are still there.
SELECT did, standpipe.deletion(deleted_seq, deleted_time) FROM standpipe.accounts
WHERE purge_pending AND deleted_time IS NOT NULL ORDER BY did LIMIT 1
