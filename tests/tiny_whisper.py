"""A Whisper of random weights and one-byte tokens, made offline:
it hears nonsense, but always the same nonsense."""

import torch

from dlpo_nb.audio import import_torchaudio

SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|notimestamps|>",
]


def save_tiny_whisper(folder, seconds=30, multilingual=True, seed=0):
    """Saves a Whisper that hears windows of `seconds` (int) to `folder` (path), and gives the folder back."""
    import_torchaudio()
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()) + SPECIAL)}
    tokenizer = WhisperTokenizer(vocab=ids, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    end, start, english, transcribe, translate, plain = (ids[token] for token in SPECIAL)
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=len(ids), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=50 * seconds, max_target_positions=32, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=start, suppress_tokens=None, begin_suppress_tokens=None,
        init_std=1.0,
    ))  # fmt: skip
    settings = model.generation_config
    settings._from_model_config = False  # else loading forgets what follows
    settings.is_multilingual, settings.no_timestamps_token_id = multilingual, plain
    if multilingual:
        settings.lang_to_id = {"<|en|>": english}
        settings.task_to_id = {"transcribe": transcribe, "translate": translate}
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=seconds), tokenizer).save_pretrained(folder)
    return folder
