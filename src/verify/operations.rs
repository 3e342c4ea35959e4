//! Undoes a commit's operations on the part of the tree that it brings along. The result must be the tree before it: then
//! the operations are all that changed, and nothing was left out.
//!
//! The rule is that of "Inductive Firehose" (<https://atproto.com/specs/sync>).

use shrike::cbor::Cid;
use shrike::mst::{DetachedTree, MstError};

use super::claim::{Claim, ClaimedOp};
use super::{Archive, Fault, Invalid, shown};

/// Whether the operations hold that led to the tree `data`; `false` if that cannot be known, because the frame does not
/// name the tree before.
///
/// # Errors
///
/// They do not hold, or the archive lacks a part of the tree that they touch.
pub fn undo(claim: &Claim<'_>, archive: &Archive<'_>, data: Cid) -> Result<bool, Invalid> {
    let ops = in_order(&claim.ops, claim.prev_data.is_some() || claim.since.is_none())?;
    let before = match (claim.prev_data, claim.since) {
        (Some(before), _) => before,
        // The first commit: the tree before it is empty.
        (None, None) => flush(&mut DetachedTree::new())?,
        (None, Some(_)) => {
            // What the operations lead to can still be checked, but not whether one was left out.
            let mut tree = DetachedTree::load(data);
            for op in ops {
                let found = tree.get(archive, op.path).map_err(|error| unreadable(&error))?;
                expect(op, found)?;
            }
            return Ok(false);
        }
    };
    let mut tree = DetachedTree::load(data);
    for op in ops {
        undo_one(&mut tree, archive, op)?;
    }
    let root = flush(&mut tree)?;
    if root != before {
        let message = format!("undoing the operations gives the tree {root} instead of {before}");
        return Err(Invalid::new(Fault::Operations, message));
    }
    Ok(true)
}

/// The operations in the order in which they are undone: deletes first, so that everything else has its neighbours.
///
/// Hosts that do not name the tree before it do not name the records before them, either.
fn in_order<'a, 'c>(ops: &'a [ClaimedOp<'c>], with_prev: bool) -> Result<Vec<&'a ClaimedOp<'c>>, Invalid> {
    let mut ordered: Vec<&ClaimedOp<'_>> = ops.iter().collect();
    ordered.sort_unstable_by_key(|op| (op.action != "delete", op.path));
    let mut paths: Vec<&str> = ops.iter().map(|op| op.path).collect();
    paths.sort_unstable();
    if let Some((path, _)) = paths.iter().zip(paths.iter().skip(1)).find(|(one, next)| one == next) {
        let message = format!("the commit has several operations on {path}");
        return Err(Invalid::new(Fault::Operations, message));
    }
    for op in &ordered {
        let whole = match op.action {
            "create" => op.cid.is_some() && op.prev.is_none(),
            "update" => op.cid.is_some() && (op.prev.is_some() || !with_prev),
            "delete" => op.cid.is_none() && (op.prev.is_some() || !with_prev),
            _ => false,
        };
        if !whole {
            let (path, action) = (op.path, op.action);
            let message = format!(
                "the operation {action:?} on {path} has cid {} and prev {}",
                shown(op.cid),
                shown(op.prev)
            );
            return Err(Invalid::new(Fault::Operations, message));
        }
    }
    Ok(ordered)
}

fn undo_one(tree: &mut DetachedTree, archive: &Archive<'_>, op: &ClaimedOp<'_>) -> Result<(), Invalid> {
    let found = match op.prev {
        Some(prev) => tree.insert(archive, op.path.to_owned(), prev),
        None => tree.remove(archive, op.path),
    }
    .map_err(|error| unreadable(&error))?;
    expect(op, found)
}

/// What the tree has at the operation's path must be what the operation says.
fn expect(op: &ClaimedOp<'_>, found: Option<Cid>) -> Result<(), Invalid> {
    if found == op.cid {
        return Ok(());
    }
    let message =
        format!("the tree has {} at {}, the {} says {}", shown(found), op.path, op.action, shown(op.cid));
    Err(Invalid::new(Fault::Operations, message))
}

fn flush(tree: &mut DetachedTree) -> Result<Cid, Invalid> {
    tree.flush().map(|written| written.root).map_err(|error| unreadable(&error))
}

fn unreadable(error: &MstError) -> Invalid {
    Invalid::new(Fault::Operations, format!("the tree: {error}"))
}
