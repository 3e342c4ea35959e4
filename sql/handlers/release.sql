-- Lets others take a task.
SELECT pg_advisory_unlock(29298, hashtext($1::text || ' ' || $2::text))
