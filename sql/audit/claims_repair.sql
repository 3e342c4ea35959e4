-- As standpipe.put_handles decides it.
UPDATE users u SET handle = CASE
        WHEN (SELECT h.did FROM standpipe.handles h WHERE h.handle = a.handle) = a.did THEN a.handle
        ELSE 'handle.invalid'
    END
FROM standpipe.accounts a
WHERE a.did = ANY ($1::text[]) AND a.handle IS NOT NULL AND u.did = a.did
