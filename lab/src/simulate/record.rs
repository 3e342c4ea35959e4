//! What is written in the simulated records.

use std::borrow::Cow;
use std::io::Write;

use jiff::Timestamp;
use shrike::car::CarError;
use shrike::cbor::{CborError, Cid, Codec, Encoder, cbor_key_cmp};

use super::accounts::{Accounts, StrongRef, tid};

pub(super) const POST: &str = "app.bsky.feed.post";
pub(super) const LIKE: &str = "app.bsky.feed.like";
pub(super) const REPOST: &str = "app.bsky.feed.repost";
pub(super) const FOLLOW: &str = "app.bsky.graph.follow";
pub(super) const BLOCK: &str = "app.bsky.graph.block";
pub(super) const PROFILE: &str = "app.bsky.actor.profile";
pub(super) const LIST: &str = "app.bsky.graph.list";
pub(super) const LIST_ITEM: &str = "app.bsky.graph.listitem";
pub(super) const LIST_BLOCK: &str = "app.bsky.graph.listblock";
pub(super) const STARTER_PACK: &str = "app.bsky.graph.starterpack";
pub(super) const GENERATOR: &str = "app.bsky.feed.generator";
pub(super) const THREADGATE: &str = "app.bsky.feed.threadgate";
pub(super) const POSTGATE: &str = "app.bsky.feed.postgate";
pub(super) const LABELER: &str = "app.bsky.labeler.service";
/// A collection that no consumer knows.
pub(super) const THING: &str = "com.example.thing";

/// What a record is about. The rest of it comes from a number (see [`encode`]).
#[derive(Clone, Copy, Debug)]
pub(super) enum Draft {
    Post { reply: Option<Reply>, quote: Option<StrongRef>, mention: Option<u32> },
    Like(StrongRef),
    Repost(StrongRef),
    Follow(u32),
    Block(u32),
    Profile,
    List,
    ListItem { list: (u32, u64), subject: u32 },
    ListBlock { list: (u32, u64) },
    StarterPack { list: (u32, u64) },
    Generator,
    Threadgate { post: (u32, u64) },
    Postgate { post: (u32, u64) },
    Labeler,
    Thing,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub(super) root: StrongRef,
    pub(super) parent: StrongRef,
}

/// A record's block and CID. It follows from the draft, the number `chance`, the time (microseconds since 1970) and the
/// accounts' handles.
pub(super) fn encode(draft: &Draft, chance: u64, micros: i64, accounts: &Accounts) -> (Vec<u8>, Cid) {
    let mut author = Author { rng: fastrand::Rng::with_seed(chance), micros, accounts };
    let record = author.record(draft);
    let bytes = infallible_vec(|out| Ok(record.write(&mut Encoder::new(out))?));
    let cid = Cid::compute(Codec::Drisl, &bytes);
    (bytes, cid)
}

/// A value of the data model, with texts of its own.
enum Item {
    Integer(u64),
    Bool(bool),
    Text(Cow<'static, str>),
    Link(Cid),
    List(Vec<Item>),
    Map(Vec<(&'static str, Item)>),
}

impl Item {
    fn write<W: Write>(&self, cbor: &mut Encoder<W>) -> Result<(), CborError> {
        match self {
            Item::Integer(number) => cbor.encode_u64(*number),
            Item::Bool(value) => cbor.encode_bool(*value),
            Item::Text(text) => cbor.encode_text(text),
            Item::Link(cid) => cbor.encode_cid(cid),
            Item::List(items) => {
                cbor.encode_array_header(items.len() as u64)?;
                items.iter().try_for_each(|item| item.write(cbor))
            }
            Item::Map(entries) => {
                let mut entries: Vec<&(&str, Item)> = entries.iter().collect();
                entries.sort_unstable_by(|a, b| cbor_key_cmp(a.0, b.0));
                cbor.encode_map_header(entries.len() as u64)?;
                entries.into_iter().try_for_each(|(key, item)| {
                    cbor.encode_text(key)?;
                    item.write(cbor)
                })
            }
        }
    }
}

impl From<&'static str> for Item {
    fn from(text: &'static str) -> Item {
        Item::Text(Cow::Borrowed(text))
    }
}

impl From<String> for Item {
    fn from(text: String) -> Item {
        Item::Text(Cow::Owned(text))
    }
}

const WORDS: &[&str] = &[
    "the",
    "morning",
    "train",
    "is",
    "late",
    "again",
    "and",
    "nobody",
    "seems",
    "to",
    "mind",
    "because",
    "coffee",
    "still",
    "works",
    "today",
    "I",
    "read",
    "a",
    "book",
    "about",
    "rivers",
    "cities",
    "maps",
    "old",
    "computers",
    "it",
    "was",
    "good",
    "really",
    "my",
    "cat",
    "disagrees",
    "with",
    "this",
    "take",
    "we",
    "should",
    "go",
    "see",
    "that",
    "film",
    "tonight",
    "who",
    "else",
    "thinks",
    "so",
    "what",
    "weather",
    "new",
    "album",
    "out",
    "now",
    "please",
    "share",
    "thanks",
    "for",
    "all",
    "fish",
    "garden",
    "tomatoes",
    "finally",
    "ripe",
    "code",
    "compiles",
    "first",
    "time",
    "suspicious",
    "photo",
    "from",
    "yesterday",
    "walk",
    "by",
    "sea",
    "día",
    "mañana",
    "über",
    "straße",
    "café",
    "naïve",
    "ありがとう",
    "今日は",
    "寒い",
    "привет",
    "мир",
    "नमस्ते",
    "สวัสดี",
    "🦋",
    "🎉",
    "👩‍👩‍👧",
    "❤️",
    "😂",
    "🇧🇷",
];
const LANGS: &[&str] = &["en", "ja", "pt", "de", "es", "fr", "en-GB", "ko", "uk", "th"];
const TAGS: &[&str] =
    &["art", "photography", "rust", "caturday", "nowplaying", "ニュース", "furry", "gardening"];

struct Author<'a> {
    rng: fastrand::Rng,
    micros: i64,
    accounts: &'a Accounts,
}

impl Author<'_> {
    #[expect(clippy::too_many_lines, reason = "one arm for each kind")]
    fn record(&mut self, draft: &Draft) -> Item {
        let created = self.created_at(matches!(draft, Draft::Post { .. }));
        let mut entries = vec![("createdAt", created)];
        let kind = match draft {
            Draft::Post { reply, quote, mention } => {
                self.post(&mut entries, reply.as_ref(), quote.as_ref(), *mention);
                POST
            }
            Draft::Like(subject) => {
                entries.push(("subject", self.strong_ref(subject)));
                LIKE
            }
            Draft::Repost(subject) => {
                entries.push(("subject", self.strong_ref(subject)));
                REPOST
            }
            Draft::Follow(subject) => {
                entries.push(("subject", self.did(*subject)));
                FOLLOW
            }
            Draft::Block(subject) => {
                entries.push(("subject", self.did(*subject)));
                BLOCK
            }
            Draft::Profile => {
                self.profile(&mut entries);
                PROFILE
            }
            Draft::List => {
                entries.push(("name", self.words(1, 4).into()));
                let purpose = if self.chance(3) { "modlist" } else { "curatelist" };
                entries.push(("purpose", format!("app.bsky.graph.defs#{purpose}").into()));
                if self.chance(2) {
                    entries.push(("description", self.words(3, 20).into()));
                }
                LIST
            }
            Draft::ListItem { list, subject } => {
                entries.push(("list", self.uri(list.0, LIST, list.1)));
                entries.push(("subject", self.did(*subject)));
                LIST_ITEM
            }
            Draft::ListBlock { list } => {
                entries.push(("subject", self.uri(list.0, LIST, list.1)));
                LIST_BLOCK
            }
            Draft::StarterPack { list } => {
                entries.push(("name", self.words(1, 5).into()));
                entries.push(("list", self.uri(list.0, LIST, list.1)));
                entries.push(("feeds", Item::List(Vec::new())));
                STARTER_PACK
            }
            Draft::Generator => {
                entries.push(("did", "did:web:feeds.example.com".into()));
                entries.push(("displayName", self.words(1, 3).into()));
                entries.push(("description", self.words(3, 20).into()));
                if self.chance(2) {
                    entries.push(("avatar", self.blob("image/jpeg")));
                }
                GENERATOR
            }
            Draft::Threadgate { post } => {
                entries.push(("post", self.uri(post.0, POST, post.1)));
                let rule = if self.chance(2) { "mentionRule" } else { "followingRule" };
                let rule = Item::Map(vec![("$type", format!("{THREADGATE}#{rule}").into())]);
                entries.push(("allow", Item::List(if self.chance(3) { Vec::new() } else { vec![rule] })));
                THREADGATE
            }
            Draft::Postgate { post } => {
                entries.push(("post", self.uri(post.0, POST, post.1)));
                let rule = Item::Map(vec![("$type", "app.bsky.feed.postgate#disableRule".into())]);
                entries.push(("embeddingRules", Item::List(vec![rule])));
                POSTGATE
            }
            Draft::Labeler => {
                let values = Item::List(vec!["spam".into(), "rude".into()]);
                entries.push(("policies", Item::Map(vec![("labelValues", values)])));
                LABELER
            }
            Draft::Thing => {
                entries.push(("note", self.words(1, 12).into()));
                entries.push(("count", Item::Integer(self.rng.u64(0..1_000_000))));
                entries.push(("done", Item::Bool(self.rng.bool())));
                THING
            }
        };
        entries.push(("$type", kind.into()));
        Item::Map(entries)
    }

    fn post(
        &mut self,
        entries: &mut Vec<(&'static str, Item)>,
        reply: Option<&Reply>,
        quote: Option<&StrongRef>,
        mention: Option<u32>,
    ) {
        let mut text = self.words(2, 30);
        let mut facets = Vec::new();
        if let Some(account) = mention {
            let shown = format!("@{}", self.accounts.handle(account));
            let feature = Item::Map(vec![
                ("$type", "app.bsky.richtext.facet#mention".into()),
                ("did", self.did(account)),
            ]);
            facets.push(facet(&mut text, &shown, feature));
        }
        if self.chance(8) {
            let uri = format!("https://example.com/a/{}", self.rng.u32(..));
            let shown: String = uri.chars().skip("https://".len()).collect();
            let feature =
                Item::Map(vec![("$type", "app.bsky.richtext.facet#link".into()), ("uri", uri.into())]);
            facets.push(facet(&mut text, &shown, feature));
        }
        if self.chance(8) {
            let tag = self.pick(TAGS);
            let feature =
                Item::Map(vec![("$type", "app.bsky.richtext.facet#tag".into()), ("tag", tag.into())]);
            facets.push(facet(&mut text, &format!("#{tag}"), feature));
        }
        // After the facets, whose places count bytes from the beginning.
        if self.rng.u32(0..1000) == 0 {
            text.push_str(" \u{0}end");
        }
        entries.push(("text", text.into()));
        if !facets.is_empty() {
            entries.push(("facets", Item::List(facets)));
        }
        if !self.chance(5) {
            let mut langs = vec![self.pick(LANGS)];
            if self.chance(10) {
                langs.push(self.pick(LANGS));
            }
            entries.push(("langs", Item::List(langs.into_iter().map(Item::from).collect())));
        }
        if self.chance(30) {
            entries.push(("tags", Item::List(vec![self.pick(TAGS).into(), self.pick(TAGS).into()])));
        }
        if self.chance(50) {
            let label = Item::Map(vec![("val", "!no-unauthenticated".into())]);
            entries.push((
                "labels",
                Item::Map(vec![
                    ("$type", "com.atproto.label.defs#selfLabels".into()),
                    ("values", Item::List(vec![label])),
                ]),
            ));
        }
        if let Some(Reply { root, parent }) = reply {
            let both = vec![("root", self.strong_ref(root)), ("parent", self.strong_ref(parent))];
            entries.push(("reply", Item::Map(both)));
        }
        if let Some(embed) = self.embed(quote) {
            entries.push(("embed", embed));
        }
    }

    fn embed(&mut self, quote: Option<&StrongRef>) -> Option<Item> {
        let Some(quote) = quote else {
            return match self.rng.u32(0..100) {
                0..20 => Some(self.images()),
                20..30 => Some(self.external()),
                30..32 => Some(self.video()),
                _ => None,
            };
        };
        let record =
            Item::Map(vec![("$type", "app.bsky.embed.record".into()), ("record", self.strong_ref(quote))]);
        if !self.chance(4) {
            return Some(record);
        }
        let media = if self.chance(3) { self.external() } else { self.images() };
        Some(Item::Map(vec![
            ("$type", "app.bsky.embed.recordWithMedia".into()),
            ("record", record),
            ("media", media),
        ]))
    }

    fn images(&mut self) -> Item {
        let images = (0..self.rng.u32(1..=4))
            .map(|_| {
                let alt = if self.chance(2) { String::new() } else { self.words(1, 20) };
                let mut image = vec![("alt", alt.into()), ("image", self.blob("image/jpeg"))];
                if !self.chance(5) {
                    let (width, height) = (self.rng.u64(100..4000), self.rng.u64(100..4000));
                    let ratio = vec![("width", Item::Integer(width)), ("height", Item::Integer(height))];
                    image.push(("aspectRatio", Item::Map(ratio)));
                }
                Item::Map(image)
            })
            .collect();
        Item::Map(vec![("$type", "app.bsky.embed.images".into()), ("images", Item::List(images))])
    }

    fn external(&mut self) -> Item {
        let mut external = vec![
            ("uri", format!("https://example.org/{}", self.rng.u32(..)).into()),
            ("title", self.words(1, 8).into()),
            ("description", self.words(0, 30).into()),
        ];
        if self.chance(2) {
            external.push(("thumb", self.blob("image/jpeg")));
        }
        Item::Map(vec![("$type", "app.bsky.embed.external".into()), ("external", Item::Map(external))])
    }

    fn video(&mut self) -> Item {
        Item::Map(vec![
            ("$type", "app.bsky.embed.video".into()),
            ("video", self.blob("video/mp4")),
            ("alt", self.words(0, 10).into()),
        ])
    }

    fn profile(&mut self, entries: &mut Vec<(&'static str, Item)>) {
        entries.push(("displayName", self.words(1, 3).into()));
        if !self.chance(4) {
            entries.push(("description", self.words(0, 30).into()));
        }
        if !self.chance(4) {
            // The form that blobs had before they had a type; such records are still about.
            let avatar = if self.chance(50) {
                let cid = Cid::compute(Codec::Raw, &self.rng.u64(..).to_be_bytes());
                Item::Map(vec![("cid", cid.to_string().into()), ("mimeType", "image/jpeg".into())])
            } else {
                self.blob("image/jpeg")
            };
            entries.push(("avatar", avatar));
        }
        if self.chance(2) {
            entries.push(("banner", self.blob("image/png")));
        }
        if self.chance(20) {
            // Older profiles have no date.
            entries.retain(|(key, _)| *key != "createdAt");
        }
    }

    /// A few seconds before the event, in most records; see the cases.
    fn created_at(&mut self, is_post: bool) -> Item {
        let micros = self.micros - self.rng.i64(0..2_000_000);
        let dice = self.rng.u32(0..1000);
        if is_post && dice < 2 {
            // No datetime at all.
            return self.pick(&["yesterday", "2026-02-30T25:61:00Z", ""]).into();
        }
        match dice {
            // In India's time.
            2..10 => time_text(micros + 19_800_000_000).replace('Z', "+05:30").into(),
            // Without a fraction, and with a longer one.
            10..15 => time_text(micros).replace(&time_text(micros)[19..], "Z").into(),
            15..17 => time_text(micros).replace('Z', "123Z").into(),
            17..19 => format!("{}-06-15T12:00:00.000Z", self.rng.u32(2031..2100)).into(),
            19..21 => "1985-10-26T01:21:00.000Z".into(),
            _ => time_text(micros).into(),
        }
    }

    fn blob(&mut self, mime: &'static str) -> Item {
        let cid = Cid::compute(Codec::Raw, &self.rng.u64(..).to_be_bytes());
        Item::Map(vec![
            ("$type", "blob".into()),
            ("ref", Item::Link(cid)),
            ("mimeType", mime.into()),
            ("size", Item::Integer(self.rng.u64(1_000..950_000))),
        ])
    }

    fn strong_ref(&self, it: &StrongRef) -> Item {
        Item::Map(vec![
            ("uri", self.uri(it.owner, it.collection, it.rkey)),
            ("cid", it.cid.to_string().into()),
        ])
    }

    fn uri(&self, owner: u32, collection: &str, rkey: u64) -> Item {
        format!("at://{}/{collection}/{}", self.accounts.did(owner), tid(rkey)).into()
    }

    fn did(&self, account: u32) -> Item {
        self.accounts.did(account).into()
    }

    fn words(&mut self, least: usize, most: usize) -> String {
        let mut text = String::new();
        for at in 0..self.rng.usize(least..=most) {
            if at > 0 {
                text.push(' ');
            }
            text.push_str(self.pick(WORDS));
        }
        text
    }

    fn pick(&mut self, from: &[&'static str]) -> &'static str {
        from[self.rng.usize(0..from.len())]
    }

    /// True once in this many times.
    fn chance(&mut self, times: u32) -> bool {
        self.rng.u32(0..times) == 0
    }
}

/// Appends what is shown to the text; the feature at that place, in bytes.
fn facet(text: &mut String, shown: &str, feature: Item) -> Item {
    text.push(' ');
    let start = text.len() as u64;
    text.push_str(shown);
    let index = vec![("byteStart", Item::Integer(start)), ("byteEnd", Item::Integer(text.len() as u64))];
    Item::Map(vec![("index", Item::Map(index)), ("features", Item::List(vec![feature]))])
}

/// RFC 3339 with milliseconds and Z.
pub(super) fn time_text(micros: i64) -> String {
    let time = Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MAX);
    format!("{time:.3}")
}

/// What is written into memory.
pub(super) fn infallible_vec(write: impl FnOnce(&mut Vec<u8>) -> Result<(), CarError>) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    #[expect(clippy::expect_used, reason = "a Vec never refuses bytes")]
    // Unwrap safety: the encoders fail only where their writer fails, which a Vec never does, and at floats, which
    // no frame has.
    write(&mut out).expect("writing CBOR into memory cannot fail");
    out
}
