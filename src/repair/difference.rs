//! The operations that turn an account's rows into its repository.

use std::collections::HashMap;

use shrike::cbor::{Cid, Value, decode};

use crate::config::Collections;
use crate::origin::relay::decode::RepoOp;
use crate::store::repos::OwnRow;
use crate::verify::Repository;

/// The difference between a repository and rows.
pub(super) struct Difference {
    changes: Vec<Change>,
    /// Rows without a record.
    pub(super) deletes: usize,
    /// Rows that were compared.
    pub(super) rows: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    path: String,
    action: &'static str,
    cid: Option<Cid>,
    /// Whether it was not possible to compare: the row says too little about its record.
    is_blind: bool,
}

impl Difference {
    /// Compares those collections that are kept. Rows that are newer than the repository are left alone.
    pub(super) fn new(repository: &Repository<'_>, rows: Vec<OwnRow>, wanted: &Collections) -> Self {
        let keeps = |path: &str| path.split_once('/').is_some_and(|(collection, _)| wanted.keeps(collection));
        let mut rows: HashMap<String, OwnRow> =
            rows.into_iter().filter(|row| keeps(&row.path)).map(|row| (row.path.clone(), row)).collect();
        let count = rows.len();
        let is_newer =
            |row: &OwnRow| row.rev.as_deref().is_some_and(|rev| rev > repository.commit.rev.as_str());
        let mut changes = Vec::new();
        for (path, cid) in repository.records.iter().filter(|(path, _)| keeps(path)) {
            let mut is_blind = false;
            let action = match rows.remove(path) {
                None => "create",
                Some(row) if is_newer(&row) || is_same(&row, cid, repository) => continue,
                Some(row) => {
                    is_blind = row.cid.is_none() && row.subject.is_none();
                    "update"
                }
            };
            changes.push(Change { path: path.clone(), action, cid: Some(*cid), is_blind });
        }
        let gone: Vec<String> = rows.into_values().filter(|row| !is_newer(row)).map(|row| row.path).collect();
        let deletes = gone.len();
        changes.extend(gone.into_iter().map(|path| Change {
            path,
            action: "delete",
            cid: None,
            is_blind: false,
        }));
        // The order of the tree, and one that does not depend on chance.
        changes.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Self { changes, deletes, rows: count }
    }

    /// The changes as operations of a commit.
    pub(super) fn ops(&self) -> Vec<RepoOp<'_>> {
        self.changes
            .iter()
            .map(|change| RepoOp { action: change.action, path: &change.path, cid: change.cid })
            .collect()
    }

    /// Leaves out what could not be compared, and returns how much that is.
    pub(super) fn without_blind(&mut self) -> usize {
        let all = self.changes.len();
        self.changes.retain(|change| !change.is_blind);
        all - self.changes.len()
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether another one is the same.
    pub(super) fn is_that_of(&self, other: &Self) -> bool {
        self.changes == other.changes
    }

    /// Records that are missing or different.
    pub(super) fn healed(&self) -> usize {
        self.changes.len() - self.deletes
    }
}

/// Whether a row is that of this record. Where the table has neither CID nor subject, the record is written again, and is the
/// same when it has the repository's revision.
fn is_same(row: &OwnRow, cid: &Cid, repository: &Repository<'_>) -> bool {
    match (&row.cid, &row.subject) {
        (Some(known), _) => *known == cid.to_string(),
        (None, Some(known)) => {
            let record = repository.archive.get(cid).and_then(|block| decode(block).ok());
            record.is_some_and(|record| subject(&record) == Some(known))
        }
        (None, None) => row.rev.as_deref() == Some(repository.commit.rev.as_str()),
    }
}

/// What a record is about: `subject`, or its `uri`.
fn subject<'a>(record: &Value<'a>) -> Option<&'a str> {
    let field = |value: &Value<'a>, name: &str| match value {
        Value::Map(fields) => fields.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone()),
        _ => None,
    };
    match field(record, "subject")? {
        Value::Text(text) => Some(text),
        value => match field(&value, "uri")? {
            Value::Text(text) => Some(text),
            _ => None,
        },
    }
}
