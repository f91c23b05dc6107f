//! `prune`: removes what has ended and what nobody needs. What goes is what was shown in the question, or less: never a
//! sandbox that runs by then, never an image that a sandbox was created from.

use std::io::{self, BufRead, IsTerminal, Write};

use cubbyhole::{Error, Image, Sandbox};
use serde_json::json;

use crate::amount::bytes;
use crate::arguments::Prune;
use crate::failure::{Failure, clean};
use crate::images;
use crate::output;

/// What can go, and the bytes that it takes.
struct Litter {
    sandboxes: Vec<(String, u64)>,
    images: Vec<Image>,
}

/// `cubby prune`
pub async fn prune(prune: Prune) -> Result<u8, Failure> {
    let all = prune.images == prune.sandboxes;
    let litter = Litter::find(all || prune.sandboxes, all || prune.images).await?;
    if !(prune.force || litter.is_empty() || litter.is_unwanted()?) {
        return Ok(1);
    }
    let (mut sandboxes, mut images, mut freed) = (Vec::new(), Vec::new(), 0_u64);
    for (name, size) in litter.sandboxes {
        match Sandbox::remove(&name).await {
            Ok(()) => {
                freed = freed.saturating_add(size);
                sandboxes.push(name);
            }
            // It runs again, or somebody else has removed it.
            Err(Error::InvalidState { .. } | Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for image in litter.images {
        match Image::remove(image.digest()).await {
            Ok(image) => {
                freed = freed.saturating_add(image.size_on_disk());
                images.push(image);
            }
            Err(Error::ImageInUse { .. } | Error::ImageNotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if prune.json {
        let images: Vec<_> = images.iter().map(images::value).collect();
        return output::print_json(&json!({ "sandboxes": sandboxes, "images": images, "freed": freed }));
    }
    let mut text = String::new();
    for name in sandboxes.into_iter().chain(images.iter().flat_map(images::names)) {
        text += &format!("{}\n", clean(&name));
    }
    output::print(format!("{text}freed {}\n", bytes(freed)).as_bytes())
}

impl Litter {
    async fn find(with_sandboxes: bool, with_images: bool) -> Result<Self, Error> {
        let mut litter = Self { sandboxes: Vec::new(), images: Vec::new() };
        if with_sandboxes {
            for handle in Sandbox::list().await?.iter().filter(|handle| !handle.status().is_live()) {
                match handle.connect().await {
                    Ok(sandbox) => {
                        litter.sandboxes.push((handle.name().into(), sandbox.inspect().await?.size_on_disk));
                    }
                    Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if with_images {
            let goes = |user: &String| litter.sandboxes.iter().any(|(name, _)| name == user);
            let unused = |image: &Image| image.used_by().iter().all(goes);
            litter.images = Image::list().await?.into_iter().filter(unused).collect();
        }
        Ok(litter)
    }

    fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.images.is_empty()
    }

    /// Asks whoever sits at the terminal.
    fn is_unwanted(&self) -> Result<bool, Failure> {
        if !io::stdin().is_terminal() {
            return Err(Failure::new(
                "prune asks before it removes anything, and standard input is no terminal: use cubby prune -f",
            ));
        }
        let unread = |error: io::Error| Failure::new(format!("cannot ask: {error}"));
        io::stderr().write_all(self.question().as_bytes()).map_err(unread)?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer).map_err(unread)?;
        Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
    }

    fn question(&self) -> String {
        let mut text = String::from("This removes:\n");
        for (name, size) in &self.sandboxes {
            text += &format!("  sandbox {name}, with its disk ({})\n", bytes(*size));
        }
        for image in &self.images {
            let names = clean(&images::names(image).join(", "));
            text += &format!("  image {names} ({})\n", bytes(image.size_on_disk()));
        }
        text + "Go on? [y/N] "
    }
}
