-- Takes a repository, if nobody else works on it. 29297 is an arbitrary number.
SELECT pg_try_advisory_lock(29297, hashtext($1))
