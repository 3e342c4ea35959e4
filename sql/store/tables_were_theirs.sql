-- Whether the application's tables were there before us.
SELECT EXISTS (SELECT FROM standpipe.tables_before WHERE name IN ('posts', 'likes'))
