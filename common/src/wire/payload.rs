//! An Arrow IPC stream of one record batch, out of bytes of somebody who need not be trusted.
//!
//! * arrow-rs allocates what lengths say before it reads, so these are compared with what is there first.
//! * arrow-rs sets up zstd for every dictionary and every batch. zstd then asks the processor what it can, which is a trap
//!   on a virtual machine: 9 to 15 µs, more than to decode the readings of a hundred devices.
//! * A gateway's messages have the same devices, so they repeat their dictionaries byte by byte. A [`Decoder`] keeps
//!   those that it has read, and one zstd for its batches.

use std::{
    collections::HashMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use arrow::{
    array::{Array as _, ArrayRef, RecordBatch},
    buffer::{Buffer, MutableBuffer},
    datatypes::SchemaRef,
    error::ArrowError,
    ipc::{
        self, BodyCompressionMethod, CompressionType, Message, MessageHeader, RecordBatchArgs,
        Schema as SchemaHeader, Type,
        convert::fb_to_schema,
        reader::{read_dictionary, read_record_batch},
        root_as_message,
    },
};
use flatbuffers::FlatBufferBuilder;
use zstd::bulk::Decompressor;

use super::{Lane, MAX_ROWS, WireError, conform};

/// Most bytes that an Arrow payload may decode to; a smaller payload that claims more is refused.
const MAX_DECODED: usize = 256 * 1024 * 1024;
/// Dictionaries of more bytes than this are not kept.
const LARGE: usize = 64 * 1024;
/// In place of the length of a buffer that is not compressed: -1.
const NOT_COMPRESSED: [u8; 8] = [0xFF; 8];
/// Bytes to which the buffers of a batch are aligned.
const ALIGNED: usize = 8;
/// Most bytes of dictionaries that are kept.
const MAX_KEPT: usize = 16 * 1024 * 1024;

/// Reads the payloads of lanes. One that has read others of the same gateways is faster, and no different.
#[derive(Default)]
pub struct Decoder {
    /// Dictionaries of text by the bytes of their message.
    kept: HashMap<Box<[u8]>, ArrayRef>,
    kept_bytes: usize,
    zstd: Decompressor<'static>,
    /// Of the batch that was decompressed last.
    header: FlatBufferBuilder<'static>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Decoder({} dictionaries, {} B)", self.kept.len(), self.kept_bytes)
    }
}

impl Decoder {
    /// [`super::decode`], with what the payload repeats of the message's identity.
    ///
    /// # Errors
    /// See [`super::decode`].
    pub fn decode(
        &mut self,
        lane: Lane,
        payload: &[u8],
    ) -> Result<(RecordBatch, HashMap<String, String>), WireError> {
        // arrow-rs checks offsets, lengths and UTF-8 of what it reads, but some malformed metadata still
        // trips an assertion in it; a poison message must not take its reader down.
        let read = catch_unwind(AssertUnwindSafe(|| self.read(payload)));
        let batch = read.unwrap_or_else(|_| Err(malformed("malformed metadata")))?;
        let rows = conform(lane, &batch)?;
        let schema = batch.schema();
        drop(batch);
        Ok((rows, Arc::unwrap_or_clone(schema).metadata))
    }

    /// The batch, with the columns that it says it has. May panic.
    pub(super) fn read(&mut self, payload: &[u8]) -> Result<RecordBatch, WireError> {
        let arrow = |e: ArrowError| malformed(&e.to_string());
        let mut parts = Parts { rest: payload, decoded: 0 };
        let first = parts.next()?.ok_or_else(|| malformed("it is empty"))?;
        let header =
            first.message.header_as_schema().ok_or_else(|| malformed("it does not begin with a schema"))?;
        let schema: SchemaRef = Arc::new(fb_to_schema(header));
        let mut dictionaries: HashMap<i64, ArrayRef> = HashMap::new();
        let mut read = None;
        while let Some(Part { message, bytes, body, decoded }) = parts.next()? {
            let version = message.version();
            match message.header_type() {
                MessageHeader::DictionaryBatch => {
                    let dictionary = message
                        .header_as_dictionary_batch()
                        .ok_or_else(|| malformed("a dictionary without a header"))?;
                    let id = dictionary.id();
                    let keeps = !dictionary.isDelta() && bytes.len() <= LARGE && is_text(header, id);
                    if keeps && let Some(known) = self.kept.get(bytes) {
                        dictionaries.insert(id, Arc::clone(known));
                        continue;
                    }
                    read_dictionary(&Buffer::from(body), dictionary, &schema, &mut dictionaries, &version)
                        .map_err(arrow)?;
                    if let Some(words) = dictionaries.get(&id).filter(|_| keeps) {
                        self.keep(bytes, words);
                    }
                }
                MessageHeader::RecordBatch if read.is_none() => {
                    let batch = message
                        .header_as_record_batch()
                        .ok_or_else(|| malformed("a batch without a header"))?;
                    if batch.length() > MAX_ROWS {
                        let rows = batch.length();
                        return Err(malformed(&format!("it holds {rows} rows, more than {MAX_ROWS}")));
                    }
                    let (batch, body) = self.plain(batch, body, decoded)?;
                    let batch =
                        read_record_batch(&body, batch, Arc::clone(&schema), &dictionaries, None, &version);
                    read = Some(batch.map_err(arrow)?);
                }
                MessageHeader::RecordBatch => return Err(malformed("it holds more than one batch")),
                other => {
                    return Err(malformed(&format!("a message of kind {other:?} where its batch belongs")));
                }
            }
        }
        read.ok_or_else(|| malformed("it holds no batch"))
    }

    /// A batch and its body with what zstd has compressed as it was before (Arrow Columnar Format, `Message.fbs`: each
    /// buffer begins with its decoded length, or says that it is not compressed); `decoded` is what they say together.
    fn plain<'a>(
        &'a mut self,
        batch: ipc::RecordBatch<'a>,
        body: &[u8],
        decoded: usize,
    ) -> Result<(ipc::RecordBatch<'a>, Buffer), WireError> {
        let by_zstd = batch.compression().is_some_and(|by| {
            (by.codec(), by.method()) == (CompressionType::ZSTD, BodyCompressionMethod::BUFFER)
        });
        let (true, Some(buffers)) = (by_zstd, batch.buffers()) else {
            return Ok((batch, Buffer::from(body)));
        };
        let mut plain = MutableBuffer::new(decoded + ALIGNED * buffers.len());
        let mut places = Vec::with_capacity(buffers.len());
        let zstd = |e| malformed(&format!("zstd: {e}"));
        for buffer in buffers {
            let begin = plain.len();
            match taken(buffer, body).map(|bytes| bytes.split_first_chunk::<8>().ok_or(bytes)) {
                Some(Ok((&NOT_COMPRESSED, bytes))) => plain.extend_from_slice(bytes),
                Some(Ok((length, bytes))) => {
                    let length = usize::try_from(i64::from_le_bytes(*length));
                    let length = length.map_err(|_| malformed("a buffer of negative length"))?;
                    plain.resize(begin + length, 0);
                    // Nothing at all may stand for nothing.
                    let written = match length {
                        0 => 0,
                        _ => self.zstd.decompress_to_buffer(bytes, &mut plain[begin..]).map_err(zstd)?,
                    };
                    if written != length {
                        return Err(malformed(&format!("a buffer of {written} B that says {length} B")));
                    }
                }
                Some(Err([])) => {}
                Some(Err(_)) | None => return Err(malformed("a buffer that its body does not hold")),
            }
            let place = |at: usize| i64::try_from(at).expect("less than MAX_DECODED");
            places.push(ipc::Buffer::new(place(begin), place(plain.len() - begin)));
            plain.resize(plain.len().next_multiple_of(ALIGNED), 0);
        }
        let header = &mut self.header;
        header.reset();
        let nodes: Vec<ipc::FieldNode> = batch.nodes().into_iter().flatten().copied().collect();
        let counts: Option<Vec<i64>> = batch.variadicBufferCounts().map(|counts| counts.iter().collect());
        let args = RecordBatchArgs {
            length: batch.length(),
            nodes: Some(header.create_vector(&nodes)),
            buffers: Some(header.create_vector(&places)),
            compression: None,
            variadicBufferCounts: counts.map(|counts| header.create_vector(&counts)),
        };
        let batch = ipc::RecordBatch::create(header, &args);
        header.finish(batch, None);
        let batch = flatbuffers::root::<ipc::RecordBatch<'_>>(header.finished_data());
        Ok((batch.map_err(|e| malformed(&e.to_string()))?, plain.into()))
    }

    fn keep(&mut self, bytes: &[u8], words: &ArrayRef) {
        let size = bytes.len() + words.get_array_memory_size();
        if size > LARGE {
            return;
        }
        if self.kept_bytes + size > MAX_KEPT {
            self.kept.clear();
            self.kept_bytes = 0;
        }
        self.kept_bytes += size;
        self.kept.insert(bytes.into(), Arc::clone(words));
    }
}

fn malformed(what: &str) -> WireError {
    WireError::Payload(what.to_owned())
}

/// Whether a dictionary's values are text to every column that uses it: then its bytes alone say what it is.
fn is_text(schema: SchemaHeader<'_>, id: i64) -> bool {
    let fields = schema.fields().into_iter().flatten();
    let mut types = fields.filter(|f| f.dictionary().is_some_and(|d| d.id() == id)).map(|f| f.type_type());
    types.next() == Some(Type::Utf8) && types.all(|other| other == Type::Utf8)
}

/// A message of the stream.
struct Part<'a> {
    message: Message<'a>,
    /// Header and body.
    bytes: &'a [u8],
    body: &'a [u8],
    /// The bytes that its compressed buffers say they decode to.
    decoded: usize,
}

/// The messages of a stream. None has a header or a body that is longer than the payload, nor compressed buffers that
/// claim to decode to more than [`MAX_DECODED`] with those before it.
struct Parts<'a> {
    rest: &'a [u8],
    decoded: usize,
}

impl<'a> Parts<'a> {
    fn next(&mut self) -> Result<Option<Part<'a>>, WireError> {
        let Some((head, tail)) = self.rest.split_first_chunk::<4>() else { return Ok(None) };
        let (length, tail) = match u32::from_le_bytes(*head) {
            u32::MAX => tail.split_first_chunk::<4>().map(|(l, t)| (u32::from_le_bytes(*l), t)),
            length => Some((length, tail)),
        }
        .ok_or_else(|| malformed("it ends within a message length"))?;
        if length == 0 {
            self.rest = &[];
            return Ok(None);
        }
        let (header, after) =
            tail.split_at_checked(length as usize).ok_or_else(|| malformed("it ends within a message"))?;
        let message =
            root_as_message(header).map_err(|e| malformed(&format!("broken message header: {e}")))?;
        let length = usize::try_from(message.bodyLength()).map_err(|_| malformed("negative body length"))?;
        let (body, after) =
            after.split_at_checked(length).ok_or_else(|| malformed("it ends within a message body"))?;
        let batch = message
            .header_as_record_batch()
            .or_else(|| message.header_as_dictionary_batch().and_then(|d| d.data()))
            .filter(|batch| batch.compression().is_some());
        let decoded = batch.map_or(0, |batch| claimed(&batch, body));
        self.decoded = self.decoded.saturating_add(decoded);
        if self.decoded > MAX_DECODED {
            return Err(malformed(&format!("it decodes to {} B, more than {MAX_DECODED} B", self.decoded)));
        }
        self.rest = after;
        Ok(Some(Part { message, bytes: &tail[..header.len() + length], body, decoded }))
    }
}

/// The bytes that the buffers of a compressed batch say they decode to.
fn claimed(batch: &ipc::RecordBatch<'_>, body: &[u8]) -> usize {
    let claim = |buffer: &ipc::Buffer| {
        let (length, bytes) = taken(buffer, body)?.split_first_chunk::<8>()?;
        Some(usize::try_from(i64::from_le_bytes(*length)).unwrap_or(bytes.len()))
    };
    batch.buffers().into_iter().flatten().filter_map(claim).fold(0, usize::saturating_add)
}

/// The bytes of a buffer, if it lies within the body.
fn taken<'a>(buffer: &ipc::Buffer, body: &'a [u8]) -> Option<&'a [u8]> {
    let begin = usize::try_from(buffer.offset()).ok()?;
    body.get(begin..begin.checked_add(usize::try_from(buffer.length()).ok()?)?)
}
