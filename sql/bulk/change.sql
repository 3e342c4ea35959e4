-- All other operations, one by one. Returns what each changed, and the changes of counters.
SELECT c.applied, ARRAY(SELECT d.post_uri FROM unnest(c.deltas) d),
    ARRAY(SELECT d.likes FROM unnest(c.deltas) d), ARRAY(SELECT d.reposts FROM unnest(c.deltas) d),
    ARRAY(SELECT d.replies FROM unnest(c.deltas) d), ARRAY(SELECT d.quotes FROM unnest(c.deltas) d),
    ARRAY(SELECT d.bookmarks FROM unnest(c.deltas) d)
FROM standpipe.change($1, NULL, $2, $3) c
