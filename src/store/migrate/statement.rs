//! Splits migration files into statements.

/// One statement of a migration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Its text in the file, without preceding comments.
    pub sql: String,
    /// What it does.
    pub kind: Kind,
}

/// The statements that the runner understands. A table of the application is given by its name, one of ours as
/// `standpipe.<name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `CREATE TABLE IF NOT EXISTS`
    Table(String),
    /// `ALTER TABLE ... ADD COLUMN IF NOT EXISTS ..., ADD COLUMN ...`
    Columns { table: String, columns: Vec<String> },
    /// `CREATE INDEX IF NOT EXISTS`: only on a table that standpipe created. With CONCURRENTLY: on every database.
    Index { name: String, table: String, everywhere: bool },
    /// `CREATE TYPE`, which has no IF NOT EXISTS
    Type(String),
    /// `ALTER TYPE ... ADD ATTRIBUTE`, which has none either
    Attribute { of: String, name: String },
    /// Anything else: it must be quick, and harmless when repeated.
    Other,
}

/// The statements of a file, in order.
pub fn split(file: &str) -> Vec<Statement> {
    let mut statements = Vec::new();
    // The statement with and without comments.
    let (mut sql, mut bare) = (String::new(), String::new());
    let mut rest = file;
    while let Some(first) = rest.chars().next() {
        let (length, comment) = match first {
            '-' if rest.starts_with("--") => (rest.find('\n').map_or(rest.len(), |end| end + 1), true),
            '\'' | '"' => (1 + rest[1..].find(first).map_or(rest.len() - 1, |end| end + 1), false),
            '$' => (quoted_by_dollars(rest).unwrap_or(1), false),
            ';' => {
                add(&mut statements, &sql, &bare);
                (sql, bare) = (String::new(), String::new());
                rest = &rest[1..];
                continue;
            }
            other => (other.len_utf8(), false),
        };
        let (piece, after) = rest.split_at(length);
        // A comment before the statement belongs to the file, not to the statement.
        if !(bare.trim().is_empty() && (comment || piece.trim().is_empty())) {
            sql.push_str(piece);
        }
        bare.push_str(if comment { "\n" } else { piece });
        rest = after;
    }
    add(&mut statements, &sql, &bare);
    statements
}

fn add(statements: &mut Vec<Statement>, sql: &str, bare: &str) {
    if !bare.trim().is_empty() {
        statements.push(Statement { sql: sql.trim().to_owned(), kind: kind(bare) });
    }
}

/// The length of `$tag$ ... $tag$` at the beginning of a text.
fn quoted_by_dollars(text: &str) -> Option<usize> {
    let tag = text.find('$').and_then(|_| text[1..].find('$')).map(|end| &text[..end + 2])?;
    if !tag[1..tag.len() - 1].chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return None;
    }
    text[tag.len()..].find(tag).map(|end| tag.len() + end + tag.len())
}

fn kind(bare: &str) -> Kind {
    let words: Vec<&str> = bare
        .split(|c: char| c.is_whitespace() || "(),".contains(c))
        .filter(|word| !word.is_empty())
        .collect();
    match words[..] {
        ["CREATE", "TABLE", "IF", "NOT", "EXISTS", name, ..] => Kind::Table(name.to_owned()),
        ["CREATE", "INDEX", "IF", "NOT", "EXISTS", name, "ON", table, ..] => {
            Kind::Index { name: name.to_owned(), table: table.to_owned(), everywhere: false }
        }
        ["CREATE", "INDEX", "CONCURRENTLY", "IF", "NOT", "EXISTS", name, "ON", table, ..] => {
            Kind::Index { name: name.to_owned(), table: table.to_owned(), everywhere: true }
        }
        ["CREATE", "TYPE", name, ..] => Kind::Type(name.to_owned()),
        ["ALTER", "TYPE", of, "ADD", "ATTRIBUTE", name, ..] => {
            Kind::Attribute { of: of.to_owned(), name: name.to_owned() }
        }
        ["ALTER", "TABLE", table, "ADD", "COLUMN", ..] => {
            let columns = words
                .windows(6)
                .filter(|six| six[..5] == ["ADD", "COLUMN", "IF", "NOT", "EXISTS"])
                .map(|six| six[5].to_owned());
            Kind::Columns { table: table.to_owned(), columns: columns.collect() }
        }
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_split_where_postgresql_ends_them() {
        let file = "-- first; not\nCREATE TABLE IF NOT EXISTS a (x text DEFAULT ';', -- said; so\n y int);\n\n\
                    DO $$ BEGIN x; END $$;\nDO $b$ $$; $b$;\nSELECT 1";
        let found = split(file);
        let sqls: Vec<&str> = found.iter().map(|statement| statement.sql.as_str()).collect();
        assert_eq!(
            sqls,
            [
                "CREATE TABLE IF NOT EXISTS a (x text DEFAULT ';', -- said; so\n y int)",
                "DO $$ BEGIN x; END $$",
                "DO $b$ $$; $b$",
                "SELECT 1"
            ]
        );
        assert_eq!(found[0].kind, Kind::Table("a".to_owned()));
        assert_eq!(found[1].kind, Kind::Other);
    }

    #[test]
    fn statement_kinds_and_names_are_recognised() {
        let kinds = |sql: &str| split(sql).remove(0).kind;
        assert_eq!(
            kinds(
                "ALTER TABLE t -- why\n ADD COLUMN IF NOT EXISTS a text, ADD COLUMN IF NOT EXISTS b numeric(3, 1);"
            ),
            Kind::Columns { table: "t".to_owned(), columns: vec!["a".to_owned(), "b".to_owned()] }
        );
        assert_eq!(
            kinds("CREATE INDEX IF NOT EXISTS i ON standpipe.t (a) WHERE b;"),
            Kind::Index { name: "i".to_owned(), table: "standpipe.t".to_owned(), everywhere: false }
        );
        assert_eq!(
            kinds("CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON t (a);"),
            Kind::Index { name: "i".to_owned(), table: "t".to_owned(), everywhere: true }
        );
        assert_eq!(kinds("CREATE TYPE standpipe.op AS (a text);"), Kind::Type("standpipe.op".to_owned()));
        assert_eq!(
            kinds("ALTER TYPE standpipe.op ADD ATTRIBUTE z text;"),
            Kind::Attribute { of: "standpipe.op".to_owned(), name: "z".to_owned() }
        );
    }

    #[test]
    fn every_migration_statement_can_be_repeated() {
        for (version, name, sql) in super::super::MIGRATIONS {
            for statement in split(sql) {
                if statement.kind == Kind::Other {
                    let known = ["DO ", "DROP ", "COMMENT ", "CREATE OR REPLACE "];
                    assert!(
                        known.iter().any(|word| statement.sql.starts_with(word)),
                        "{version:04}_{name}: the runner does not know {:?}",
                        statement.sql
                    );
                }
                if let Kind::Columns { columns, .. } = &statement.kind {
                    assert_eq!(
                        statement.sql.matches("ADD COLUMN").count(),
                        columns.len(),
                        "{}",
                        statement.sql
                    );
                    assert!(!columns.is_empty(), "{}", statement.sql);
                }
            }
        }
    }
}
