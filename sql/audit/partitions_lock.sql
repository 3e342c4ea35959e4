-- Shares the partitions of the accounts that these keys ($1: URIs or DIDs) belong to, before any of the accounts is locked.
SELECT standpipe.share_partitions(ARRAY(
    SELECT DISTINCT CASE WHEN k.key LIKE 'at://%' THEN split_part(k.key, '/', 3) ELSE k.key END
    FROM unnest($1::text[]) AS k (key)))
