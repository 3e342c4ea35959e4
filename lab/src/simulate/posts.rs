//! The posts that people look at.

use super::accounts::StrongRef;
use super::chance::{skewed, young};
use super::record::Reply;

/// How many of the youngest posts can be liked, answered, changed and deleted.
const POSTS: u64 = 32_768;
/// Places of popular posts. The first one draws a twelfth of all likes, and every place is taken over by another post
/// after some 2,000 posts, so that a popular post gathers several hundred likes.
pub(super) const HOT: usize = 256;

#[derive(Clone, Copy)]
pub(super) struct Post {
    pub(super) it: StrongRef,
    pub(super) reply: Option<Reply>,
    pub(super) alive: bool,
}

impl Post {
    /// What an answer to this post refers to.
    pub(super) fn as_parent(&self) -> Reply {
        Reply { root: self.reply.map_or(self.it, |reply| reply.root), parent: self.it }
    }
}

/// The youngest posts, by number, and which of them are popular.
pub(super) struct Posts {
    ring: Vec<Post>,
    written: u64,
    hot: Vec<u64>,
}

impl Posts {
    pub(super) fn new() -> Self {
        Posts { ring: Vec::new(), written: 0, hot: Vec::new() }
    }

    pub(super) fn add(&mut self, post: Post, hot: Option<usize>) {
        if let Some(place) = hot {
            match self.hot.get_mut(place) {
                Some(popular) => *popular = self.written,
                None => self.hot.push(self.written),
            }
        }
        let at = (self.written % POSTS) as usize;
        if at < self.ring.len() {
            self.ring[at] = post;
        } else {
            self.ring.push(post);
        }
        self.written += 1;
    }

    pub(super) fn get(&self, number: u64) -> Option<&Post> {
        let is_there = number < self.written && self.written - number <= POSTS;
        if is_there { self.ring.get((number % POSTS) as usize) } else { None }
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Post> {
        let is_there = number < self.written && self.written - number <= POSTS;
        if is_there { self.ring.get_mut((number % POSTS) as usize) } else { None }
    }

    pub(super) fn youngest(&self) -> Option<u64> {
        self.written.checked_sub(1)
    }

    /// Any post, evenly.
    pub(super) fn any(&self, rng: &mut fastrand::Rng) -> Option<u64> {
        let kept = self.ring.len() as u64;
        if kept == 0 { None } else { Some(self.written - 1 - rng.u64(0..kept)) }
    }

    /// A post as people come upon them.
    pub(super) fn any_seen(&self, rng: &mut fastrand::Rng) -> Option<u64> {
        let kept = self.ring.len() as u64;
        if kept == 0 {
            return None;
        }
        if rng.bool()
            && let Some(&number) = self.hot.get(skewed(rng, self.hot.len() as u32, 3) as usize)
            && self.get(number).is_some()
        {
            return Some(number);
        }
        Some(self.written - 1 - young(rng, kept))
    }
}
