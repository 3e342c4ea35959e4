//! Every statement in a file is one that PostgreSQL accepts, and every file is used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use standpipe::config::{Role, from_env};
use standpipe::store::{Store, migrate, partition};

use crate::support::{Postgres, connect};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The SQL files in this folder of `sql/`.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(root().join("sql").join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "sql/{folder} is empty");
    found
}

#[tokio::test]
async fn every_statement_can_be_prepared_on_a_migrated_database() {
    let database = Postgres::shared().await.fresh_database().await;
    let (config, _) = from_env([("DATABASE_URL", database.as_str())], Role::Worker).unwrap();
    let store = Store::new(&config).unwrap();
    let mut session = store.session().await.unwrap();
    migrate::migrate(session.client_mut()).await.unwrap();
    // The page shows the figures of this extension. Unless its library is loaded its view cannot be read, but
    // queries on it can be prepared.
    let client = connect(&database).await;
    client.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await.unwrap();
    let schema = std::fs::read_to_string(root().join("sql/store/statements_schema.sql")).unwrap();
    let schema: String = client.query_one(&schema, &[]).await.unwrap().get(0);
    let mut prepared = 0;
    for path in ["store", "bulk", "check", "audit", "repair", "handlers"].into_iter().flat_map(files) {
        let sql = std::fs::read_to_string(&path).unwrap().replace("pg_stat_schema", &schema);
        assert!(sql.starts_with("-- "), "{} does not say what it is for", path.display());
        if let Err(error) = session.client().prepare(&sql).await {
            panic!(
                "{}: {}",
                path.display(),
                error.as_db_error().map_or(error.to_string(), ToString::to_string)
            );
        }
        prepared += 1;
    }
    println!("{prepared} statements");
    let wrong = session.client().prepare("SELECT nothing FROM standpipe.nowhere").await;
    assert!(wrong.is_err(), "a statement that cannot be prepared was");
}

#[test]
fn every_sql_file_is_used_and_the_sources_contain_no_inline_statements() {
    fn walk(folder: &Path, into: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                into.push((path, text));
            }
        }
    }
    let mut sources = Vec::new();
    walk(&root().join("src"), &mut sources);
    let used: BTreeSet<String> = sources
        .iter()
        .flat_map(|(_, text)| text.split("include_str!(\"").skip(1))
        .filter_map(|rest| rest.split('"').next()?.rsplit_once("sql/").map(|(_, name)| name.to_owned()))
        .collect();
    // Those of apply and migrations are listed by build.rs.
    for folder in ["store", "bulk", "check", "audit", "repair", "handlers"] {
        for path in files(folder) {
            let name = format!("{folder}/{}", path.file_name().unwrap().to_str().unwrap());
            assert!(used.contains(&name), "sql/{name} is used nowhere");
        }
    }
    // Statements that are put together at run time, for names that are known only then, and those that set up
    // a session.
    let built =
        ["migrate.rs", "undo.rs", "step.rs", "statement.rs", "settings.rs", "audit.rs", "store/handlers.rs"];
    for (path, text) in &sources {
        if built.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        for start in ["\"SELECT ", "\"INSERT ", "\"UPDATE ", "\"DELETE ", "\"WITH ", "\"CALL "] {
            for (at, _) in text.match_indices(start) {
                let statement = text[at..].lines().next().unwrap();
                assert!(statement.starts_with("\"SELECT 1\""), "{}: {statement}", path.display());
            }
        }
    }
}

#[tokio::test]
async fn an_account_has_the_same_partition_here_and_in_the_database() {
    let database = Postgres::shared().await.fresh_database().await;
    let (config, _) = from_env([("DATABASE_URL", database.as_str())], Role::Worker).unwrap();
    let store = Store::new(&config).unwrap();
    let mut session = store.session().await.unwrap();
    migrate::migrate(session.client_mut()).await.unwrap();
    // Of every length, so that each remainder of the hash's blocks occurs.
    let dids: Vec<String> =
        (0..1000).map(|n| "did:plc:ewvi7nxzyoun6zhxrhs64oiz"[..n % 32].to_owned() + &n.to_string()).collect();
    let sql = "SELECT array_agg(standpipe.partition(d)::bigint ORDER BY i) FROM unnest($1::text[]) WITH ORDINALITY x (d, i)";
    let theirs: Vec<i64> = session.client().query_one(sql, &[&dids]).await.unwrap().get(0);
    let ours: Vec<i64> = dids.iter().map(|did| i64::try_from(partition::of(did)).unwrap()).collect();
    assert_eq!(ours, theirs);
    assert_eq!(ours.iter().collect::<BTreeSet<_>>().len(), 64, "some partitions are never used");
}
