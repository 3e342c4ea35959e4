//! The table of kinds.

/// One line per kind: its variant, its name, its collection, and the table of its rows with their key. Derived from it:
/// the name in metrics, logs and `sql/apply`, the kind of a path, the tables to check, and the kinds to purge.
macro_rules! kinds {
    ($($kind:ident $name:literal $($collection:literal)? $(=> $table:literal $key:literal)?;)*) => {
        /// The kinds of operation; `src/apply/mod.rs` lists where each is read and applied.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $(#[doc = concat!("`", $name, "`" $(, ": `", $collection, "`")?)] $kind,)*
        }

        impl Kind {
            /// Every kind, in the order in which metrics list them.
            pub const ALL: [Kind; [$($name),*].len()] = [$(Kind::$kind),*];

            /// The name in metrics, logs and the apply function's sections.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name,)* }
            }

            /// The name of its delete in `sql/apply/90_apply.sql`; registers are never deleted.
            #[must_use]
            pub fn delete_name(self) -> &'static str {
                match self { $(Kind::$kind => concat!("delete ", $name),)* }
            }

            /// The table of its rows, and the column with the URI of the record or its post; `None` for registers.
            #[must_use]
            pub fn table(self) -> Option<(&'static str, &'static str)> {
                match self {
                    $($(Kind::$kind => Some(($table, $key)),)?)*
                    _ => None,
                }
            }

            /// The kind of the records in a collection.
            #[must_use]
            pub fn of(collection: &str, rkey: &str) -> Self {
                match collection {
                    // Only the record with this key is the account's profile.
                    "app.bsky.actor.profile" if rkey == "self" => Kind::Profile,
                    $($($collection => Kind::$kind,)?)*
                    _ => Kind::Record,
                }
            }
        }
    };
}

kinds! {
    Post "post" "app.bsky.feed.post" => "posts" "uri";
    Like "like" "app.bsky.feed.like" => "likes" "uri";
    Repost "repost" "app.bsky.feed.repost" => "reposts" "uri";
    Bookmark "bookmark" "app.bsky.bookmark" => "bookmarks" "uri";
    Follow "follow" "app.bsky.graph.follow" => "follows" "uri";
    Block "block" "app.bsky.graph.block" => "blocks" "uri";
    List "list" "app.bsky.graph.list" => "lists" "uri";
    ListItem "list_item" "app.bsky.graph.listitem" => "list_items" "uri";
    ListBlock "list_block" "app.bsky.graph.listblock" => "list_blocks" "uri";
    StarterPack "starter_pack" "app.bsky.graph.starterpack" => "starter_packs" "uri";
    FeedGenerator "feed_generator" "app.bsky.feed.generator" => "feed_generators" "uri";
    LabelerService "labeler_service" "app.bsky.labeler.service" => "labeler_services" "uri";
    Label "label" "com.atproto.label.label" => "labels" "uri";
    Verification "verification" "app.bsky.graph.verification" => "verifications" "uri";
    ThreadGate "thread_gate" "app.bsky.feed.threadgate" => "thread_gates" "post_uri";
    PostGate "post_gate" "app.bsky.feed.postgate" => "post_gates" "post_uri";
    // Every other collection.
    Record "record" => "generic_records" "uri";
    // Registers: one row of their account, never deleted.
    Profile "profile";
    Identity "identity";
    Account "account";
}

impl Kind {
    /// Their order within one call. Gates come first: a post written after its gate gets its flags immediately.
    #[must_use]
    pub fn rank(self) -> (bool, Self) {
        (!matches!(self, Kind::ThreadGate | Kind::PostGate), self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_record_named_self_is_a_profile() {
        assert_eq!(Kind::of("app.bsky.actor.profile", "self"), Kind::Profile);
        assert_eq!(Kind::of("app.bsky.actor.profile", "other"), Kind::Record);
        assert_eq!(Kind::of("app.bsky.feed.like", "self"), Kind::Like);
        assert_eq!(Kind::of("com.example.thing", "1"), Kind::Record);
    }

    #[test]
    fn gates_come_first() {
        let mut kinds = [Kind::Account, Kind::Post, Kind::PostGate, Kind::Like];
        kinds.sort_by_key(|kind| kind.rank());
        assert_eq!(kinds, [Kind::PostGate, Kind::Post, Kind::Like, Kind::Account]);
    }
}
