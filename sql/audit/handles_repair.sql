-- The newest claimant keeps it; if that is unknown, as with rows of the old workers, the newest account does, because
-- newer accounts take over handles that older ones have given up.
UPDATE users u SET handle = 'handle.invalid'
WHERE u.did IN (
    SELECT p.did FROM (
        SELECT x.did, row_number() OVER (
            PARTITION BY x.handle ORDER BY coalesce(h.did = x.did, false) DESC, x.indexed_at DESC, x.did DESC) AS place
        FROM users x LEFT JOIN standpipe.handles h ON h.handle = x.handle
        WHERE x.handle = ANY ($1::text[]) AND x.handle <> 'handle.invalid'
    ) p
    WHERE p.place > 1
)
