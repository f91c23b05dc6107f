//! The images that are kept to make sandboxes from.

use std::collections::HashMap;
use std::time::SystemTime;

use cubby_image::{Progress, PullPolicy, Reference, Stored};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::builder::pull;
use crate::context::Context;
use crate::error::{Error, R};

/// How much of a digest's hexadecimal part is enough to mean it, if nothing else begins so: as much as `docker images`
/// shows.
const ENOUGH: usize = 12;

/// An image that sandboxes are made from, as it was when the store was read. It stays until it is removed, and it cannot
/// be removed while a sandbox exists that was created from it.
///
/// ```no_run
/// # async fn example() -> Result<(), cubbyhole::Error> {
/// use cubbyhole::{Image, Sandbox};
///
/// Image::pull("python:3.12").await?;
/// let sandbox = Sandbox::builder("worker").image("python:3.12").create().await?;
/// for image in Image::list().await? {
///     println!("{:?}: {} bytes, used by {:?}", image.references(), image.size_on_disk(), image.used_by());
/// }
/// let gone = Image::prune().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    stored: Stored,
    used_by: Vec<String>,
}

impl Image {
    /// Asks what `reference` stands for now, and fetches that unless it is here. What it may look like is said at
    /// [`SandboxBuilder::image`](crate::SandboxBuilder::image).
    ///
    /// # Errors
    /// [`Error::Image`]: the reference, the registry, the network, the image itself.
    pub async fn pull(reference: impl AsRef<str>) -> R<Self> {
        fetch(reference.as_ref(), &|_| ()).await
    }

    /// Like [`Self::pull`], and tells what it is doing. The stream ends with the future; dropping the future ends the pull,
    /// and the next one goes on from there.
    pub fn pull_with_progress(
        reference: impl Into<String>,
    ) -> (impl Stream<Item = Progress> + Unpin + Send, impl Future<Output = R<Self>>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let reference = reference.into();
        let pull = async move {
            // Nobody has to listen.
            fetch(&reference, &move |progress| drop(sender.send(progress))).await
        };
        (UnboundedReceiverStream::new(receiver), pull)
    }

    /// All images, the one that came last first.
    pub async fn list() -> R<Vec<Self>> {
        all(&Context::open()?)
    }

    /// The image that `name` means: a reference that stands for it, its digest (`sha256:…`), or the first 12 or more digits
    /// of that.
    ///
    /// # Errors
    /// [`Error::ImageNotFound`] if there is none, or several whose digests begin so.
    pub async fn get(name: impl AsRef<str>) -> R<Self> {
        let name = name.as_ref();
        Ok(find(all(&Context::open()?)?, name)?.0)
    }

    /// Removes the image that `name` means, and returns it as it was. If other references stand for the same image, a
    /// reference is only forgotten, and the image stays.
    ///
    /// # Errors
    /// [`Error::ImageNotFound`], as [`Self::get`]; [`Error::ImageInUse`] if a sandbox was created from it, running or not.
    pub async fn remove(name: impl AsRef<str>) -> R<Self> {
        let (name, context) = (name.as_ref(), Context::open()?);
        // From here until the image is out of sight nobody creates a sandbox from it.
        let removal = context.images.removal()?;
        let (image, reference) = find(all(&context)?, name)?;
        match reference {
            Some(reference) if image.references().len() > 1 => drop(removal.forget(&reference)?),
            _ if image.used_by.is_empty() => drop(removal.remove(&image.stored.image.digest)?),
            _ => return Err(Error::ImageInUse { image: name.into(), sandboxes: image.used_by }),
        }
        Ok(image)
    }

    /// Removes all images from which no sandbox was created that still exists, and returns them as they were.
    pub async fn prune() -> R<Vec<Self>> {
        let mut removed = Vec::new();
        for image in all(&Context::open()?)? {
            match Self::remove(image.digest()).await {
                Ok(image) => removed.push(image),
                Err(Error::ImageInUse { .. } | Error::ImageNotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// The references that stand for it, in full (`docker.io/library/python:3.12`); none if their tags have moved on to
    /// other images.
    pub fn references(&self) -> &[String] {
        &self.stored.references
    }

    /// What it is called by content: `sha256:` and 64 digits.
    pub fn digest(&self) -> String {
        self.stored.image.digest.to_string()
    }

    /// Bytes that it takes on the disk.
    pub fn size_on_disk(&self) -> u64 {
        self.stored.on_disk
    }

    /// When it was fetched.
    pub fn pulled_at(&self) -> SystemTime {
        self.stored.pulled_at
    }

    /// The sandboxes that were created from it and exist, running or not, sorted by name.
    pub fn used_by(&self) -> &[String] {
        &self.used_by
    }
}

async fn fetch(reference: &str, report: &(dyn Fn(Progress) + Send + Sync)) -> R<Image> {
    let (reference, context) = (reference.parse::<Reference>()?, Context::open()?);
    let image = pull(&context, &reference, PullPolicy::Always, report).await?;
    let all = all(&context)?;
    let pulled = all.into_iter().find(|one| one.stored.image.digest == image.digest);
    pulled.ok_or_else(|| Error::ImageNotFound { image: reference.to_string() })
}

fn all(context: &Context) -> R<Vec<Image>> {
    let mut users: HashMap<String, Vec<String>> = HashMap::new();
    for summary in context.store.list()? {
        match context.store.get(&summary.name) {
            Ok(record) => {
                let digest = record.config.image.digest.unwrap_or_default();
                users.entry(digest).or_default().push(summary.name.into());
            }
            // Removed since.
            Err(cubby_state::StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let with_users = |stored: Stored| {
        let mut used_by = users.remove(&stored.image.digest.to_string()).unwrap_or_default();
        used_by.sort_unstable();
        Image { stored, used_by }
    };
    Ok(context.images.list()?.into_iter().map(with_users).collect())
}

/// The image that `name` means, and the reference if it is one.
fn find(images: Vec<Image>, name: &str) -> R<(Image, Option<Reference>)> {
    let not_found = || Error::ImageNotFound { image: name.into() };
    // Nothing else is called so, although it could be read as a name with a tag.
    if let Some(image) = images.iter().find(|image| image.digest() == name) {
        return Ok((image.clone(), None));
    }
    let reference = name.parse::<Reference>().ok().map(|reference| reference.absolute());
    let text = reference.as_ref().map(ToString::to_string);
    let by_reference = |image: &&Image| text.as_ref().is_some_and(|text| image.references().contains(text));
    if let Some(image) = images.iter().find(by_reference) {
        return Ok((image.clone(), reference));
    }
    let begins = |image: &Image| {
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        digits.len() >= ENOUGH && image.stored.image.digest.hex().starts_with(digits)
    };
    let mut found = images.into_iter().filter(begins);
    match (found.next(), found.next()) {
        (Some(image), None) => Ok((image, None)),
        _ => Err(not_found()),
    }
}
