//! The state of the database before any change.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::super::StoreError;
use crate::event::Kind;

/// The tables that standpipe writes, and the columns that may be unique in them: those of the record, never its
/// subject. A repository can hold two likes of one post.
pub fn keys() -> Vec<(&'static str, &'static str)> {
    let own = [
        ("users", "did"),
        ("post_aggregations", "post_uri"),
        ("feed_items", "uri"),
        ("quotes", "uri"),
        ("notifications", "id"),
        ("notifications", "uri"),
    ];
    own.into_iter().chain(Kind::ALL.into_iter().filter_map(Kind::table)).collect()
}

/// The existing objects. Names are as in the migration files: a table of the application by its name, ours as
/// `standpipe.<name>`; indexes likewise.
#[derive(Debug)]
pub struct Catalogue {
    /// The schema of the application's tables.
    pub schema: String,
    /// Tables and composite types with their columns.
    pub relations: BTreeMap<String, BTreeSet<String>>,
    /// Indexes, and whether they are valid: one whose build was interrupted is not.
    pub indexes: BTreeMap<String, bool>,
    /// The application's tables that existed before us.
    pub before: BTreeSet<String>,
    /// Tables among those that this role does not own.
    pub foreign: Vec<String>,
    /// Unique indexes that forbid rows which repositories can contain.
    pub by_subject: Vec<UniqueIndex>,
    /// Indexes already replaced.
    pub replaced: Vec<ReplacedIndex>,
    /// Columns that we added to tables that existed before us.
    pub added: BTreeMap<String, Vec<String>>,
    /// Foreign keys of tables that standpipe writes.
    pub foreign_keys: Vec<String>,
}

/// A unique index to remove.
#[derive(Clone, Debug)]
pub struct UniqueIndex {
    pub name: String,
    /// Its qualified, quoted name.
    pub quoted: String,
    pub table: String,
    /// `CREATE UNIQUE INDEX ...`
    pub definition: String,
    /// The unique columns, and the rows that the index covers.
    pub keys: Vec<String>,
    pub predicate: Option<String>,
    /// The options of its constraint, if it belongs to one.
    pub constraint: Option<String>,
    /// A plain index on the same columns.
    pub equivalent: Option<String>,
}

/// A replaced unique index, as recorded in `standpipe.replaced_indexes`.
#[derive(Clone, Debug)]
pub struct ReplacedIndex {
    pub name: String,
    pub table: String,
    pub definition: String,
    pub keys: Vec<String>,
    pub predicate: Option<String>,
    pub constraint: Option<String>,
    /// The plain index that we created in its place; `None` if there was one already.
    pub replacement: Option<String>,
}

impl Catalogue {
    /// Reads the catalogue.
    pub async fn read(client: &Client) -> Result<Self, StoreError> {
        let schema: String =
            client.query_one(include_str!("../../../sql/store/schema.sql"), &[]).await?.get(0);
        let mut relations = BTreeMap::new();
        let mut foreign = Vec::new();
        let rows = client.query(include_str!("../../../sql/store/columns.sql"), &[&schema]).await?;
        for row in rows {
            let name: String = row.get(0);
            if !row.get::<_, bool>(2) && keys().iter().any(|(table, _)| *table == name) {
                foreign.push(name.clone());
            }
            relations.insert(name, row.get::<_, Vec<String>>(1).into_iter().collect());
        }
        let indexes = client.query(include_str!("../../../sql/store/index_names.sql"), &[&schema]).await?;
        let indexes = indexes.iter().map(|row| (row.get(0), row.get(1))).collect();
        let before: Vec<String> = if relations.contains_key("standpipe.tables_before") {
            client
                .query(include_str!("../../../sql/store/tables_before.sql"), &[])
                .await?
                .iter()
                .map(|row| row.get(0))
                .collect()
        } else {
            relations.keys().filter(|name| !name.starts_with("standpipe.")).cloned().collect()
        };
        let mut catalogue = Self {
            by_subject: unique_by_subject(client).await?,
            foreign_keys: foreign_keys(client).await?,
            schema,
            relations,
            indexes,
            before: before.into_iter().collect(),
            foreign,
            replaced: Vec::new(),
            added: BTreeMap::new(),
        };
        if catalogue.relations.contains_key("standpipe.replaced_indexes") {
            catalogue.read_own_notes(client).await?;
        }
        Ok(catalogue)
    }

    async fn read_own_notes(&mut self, client: &Client) -> Result<(), StoreError> {
        let rows = client.query(include_str!("../../../sql/store/replaced_indexes.sql"), &[]).await?;
        self.replaced = rows
            .iter()
            .map(|row| ReplacedIndex {
                name: row.get(0),
                table: row.get(1),
                definition: row.get(2),
                keys: row.get(3),
                predicate: row.get(4),
                constraint: row.get(5),
                replacement: row.get(6),
            })
            .collect();
        for row in client.query(include_str!("../../../sql/store/added_columns.sql"), &[]).await? {
            self.added.entry(row.get(0)).or_default().push(row.get(1));
        }
        Ok(())
    }

    /// Tables that standpipe writes, whether they existed before or it created them.
    pub fn tables(&self, before: bool) -> Vec<&'static str> {
        let mut tables: Vec<_> = keys()
            .iter()
            .map(|(table, _)| *table)
            .filter(|table| self.relations.contains_key(*table) && self.before.contains(*table) == before)
            .collect();
        tables.dedup();
        tables
    }
}

/// Unique indexes on a record's subject, whatever their names.
pub async fn unique_by_subject(client: &Client) -> Result<Vec<UniqueIndex>, StoreError> {
    let (tables, keys): (Vec<&str>, Vec<&str>) = keys().into_iter().unzip();
    let rows = client.query(include_str!("../../../sql/store/unique_indexes.sql"), &[&tables, &keys]).await?;
    let index = |row: &tokio_postgres::Row| UniqueIndex {
        name: row.get(0),
        quoted: row.get(1),
        table: row.get(2),
        definition: row.get(3),
        keys: row.get(4),
        predicate: row.get(5),
        constraint: row.get(6),
        equivalent: row.get(7),
    };
    Ok(rows.iter().map(index).collect())
}

async fn foreign_keys(client: &Client) -> Result<Vec<String>, StoreError> {
    let tables: Vec<&str> = keys().into_iter().map(|(table, _)| table).collect();
    let rows = client.query(include_str!("../../../sql/store/foreign_keys.sql"), &[&tables]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
