"""Bugs that several processes, or one alone, bring to light."""

from tests.mutations.base import (
    BANKS,
    CMLI,
    CODEBOOK,
    CODEBOOK_TESTS,
    DISTRIBUTED,
    ITC,
    ITM,
    KD,
    MASKED,
    QUANTIZER,
    TRAPS,
    Edit,
    Mutation,
    bug,
    ranks,
    state,
)

FIRST_RANKS_ROWS = [
    bug(
        "itc-own-rows-are-first-ranks",
        ITC,
        "queries = keys if self.full else own",
        "b, t = len(own.images), len(own.texts)\n"
        "        first = Pairs(keys.images[:b], keys.texts[:t], keys.image_ids[:b], keys.text_ids[:t])\n"
        "        queries = keys if self.full else first",
        ranks("itc"),
    ),
    bug(
        "kd-targets-are-first-ranks",
        KD,
        "current = current.gathered() if gathered else current",
        "current = current.gathered() if gathered else current\n"
        "        rows = len(batch.image_ids)\n"
        "        current = Targets(current.features[:rows], current.ids[:rows])\n"
        "        gathered = False",
        ranks("kd_contrastive"),
    ),
    bug(
        "kd-bank-gets-first-ranks",
        KD,
        "self.bank.push(current.features, current.ids)",
        "rows = len(batch.image_ids)\n            self.bank.push(current.features[:rows], current.ids[:rows])",
        ranks("kd_contrastive"),
    ),
    bug(
        "bank-gets-first-ranks",
        BANKS,
        "self._push(everyone)",
        "b, t = len(own.images), len(own.texts)\n"
        "            self._push(Pairs(everyone.images[:b], everyone.texts[:t], everyone.image_ids[:b], "
        "everyone.text_ids[:t]))",
        ranks("bank_itc"),
    ),
    bug(
        "momentum-queue-gets-first-ranks",
        BANKS,
        "self.images.push(normalized(keys.images), keys.image_ids)",
        "b = len(own.images)\n            self.images.push(normalized(keys.images[:b]), keys.image_ids[:b])",
        ranks("momentum_itc"),
    ),
    bug(
        "backward-gives-first-ranks-rows", DISTRIBUTED, "start = dist.get_rank() * ctx.rows", "start = 0", ranks("itc")
    ),
    bug(
        "itm-noise-is-first-ranks",
        ITM,
        "rows = slice(row_offset(images), row_offset(images) + images)",
        "rows = slice(0, images)",
        ranks("itm"),
    ),
    bug(
        "quantizer-mask-is-first-ranks",
        QUANTIZER,
        "[row_offset(rows) :][:rows]",
        "[:rows]",
        f"{TRAPS}::test_ranks_hide_the_patches_that_one_process_hides",
    ),
]

GRADIENTS = [
    bug(
        "backward-divides-by-ranks",
        DISTRIBUTED,
        "return grad[start : start + ctx.rows]",
        "return grad[start : start + ctx.rows] / dist.get_world_size()",
        f"{TRAPS}::test_rows_of_all_ranks_and_the_sum_of_their_gradients",
        ranks("itc"),
    ),
    bug("backward-without-other-ranks", DISTRIBUTED, "        dist.all_reduce(grad)\n", "", ranks("itc full")),
    bug(
        "itc-captions-gathered-without-gradient",
        ITC,
        "all_gather_with_gradient(self.texts)",
        "all_gather(self.texts)",
        ranks("itc"),
    ),
    bug(
        "itc-full-gradient-times-ranks",
        ITC,
        "return ObjectiveOutput(0.5 * (i2t + t2i), metrics)",
        "loss = 0.5 * (i2t + t2i)\n"
        "        times = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1\n"
        "        return ObjectiveOutput(loss * times - (loss * (times - 1)).detach(), metrics)",
        ranks("itc full"),
    ),
    bug(
        "cmli-scores-gathered-without-gradient",
        CMLI,
        "of_texts, start = all_gather_with_gradient(of_texts)",
        "of_texts, start = all_gather(of_texts)",
        ranks("cmli"),
    ),
    bug(
        "itm-images-gathered-without-gradient",
        ITM,
        "all_gather_with_gradient(self.images)",
        "all_gather(self.images)",
        ranks("itm"),
    ),
    bug(
        "masked-weights-without-ranks",
        MASKED,
        "return counted.to(dtype) * ranks / total.clamp(min=1)",
        "return counted.to(dtype) / total.clamp(min=1)",
        ranks("mlm"),
        ranks("mim"),
    ),
]

LABEL_OFFSETS = [
    bug("offset-is-zero", DISTRIBUTED, "return rank() * rows", "return 0", ranks("kd_contrastive")),
    bug("kd-labels-without-offset", KD, "(row_offset(count) if gathered else 0)", "0", ranks("kd_contrastive")),
    bug(
        "kd-captions-with-offset-of-captions",
        KD,
        "own = own_rows(len(batch.image_ids), gathered, ids.device)[batch.caption_image]",
        "own = batch.caption_image + (row_offset(len(ids)) if gathered else 0)",
        ranks("kd_contrastive"),
    ),
    bug("itc-own-labels-without-offset", ITC, "(row_offset(rows) if self.training else 0)", "0", ranks("itc own")),
    bug("cmli-offset-is-zero", CMLI, "row_offset(len(text_ids))", "0", ranks("cmli")),
    bug("cmli-offset-of-images", CMLI, "row_offset(len(text_ids))", "row_offset(len(image_ids))", ranks("cmli")),
    bug("mim-labels-without-offset", MASKED, "(row_offset(count) if self.training else 0)", "0", ranks("mim")),
    bug(
        "mim-rows-without-offset",
        MASKED,
        "(row_offset(images) if self.training else 0)",
        "0",
        "tests/objectives/test_masked_modeling.py::test_copies_of_an_image_on_another_device_are_no_classes",
    ),
    bug(
        "itm-columns-with-offset-of-images",
        ITM,
        "columns = slice(row_offset(captions), row_offset(captions) + captions)",
        "columns = slice(row_offset(images), row_offset(images) + captions)",
        ranks("itm"),
    ),
]

ONE_PROCESS = [
    bug(
        "gather-wants-a-group",
        DISTRIBUTED,
        "return _AllGather.apply(local) if is_distributed() else local",
        "return _AllGather.apply(local)",
        state("itc"),
    ),
    bug(
        "rank-wants-a-group",
        DISTRIBUTED,
        "return dist.get_rank() if is_distributed() else 0",
        "return dist.get_rank()",
        state("kd_contrastive"),
    ),
    bug(
        "kd-offset-missing-on-one-process",
        KD,
        "    return torch.arange(count, device=device) + (row_offset(count) if gathered else 0)",
        "    if gathered and torch.distributed.is_initialized():\n"
        "        offset = row_offset(count)\n"
        "    return torch.arange(count, device=device) + offset",
        state("kd_contrastive"),
    ),
    bug(
        "itc-offset-missing-on-one-process",
        ITC,
        "            image_ids = torch.arange(rows, device=image_ids.device) + "
        "(row_offset(rows) if self.training else 0)",
        "            if torch.distributed.is_initialized():\n"
        "                offset = row_offset(rows)\n"
        "            image_ids = torch.arange(rows, device=image_ids.device) + offset",
        "tests/objectives/test_image_text_contrast.py::test_against_loops",
    ),
    Mutation(
        "cmli-keys-missing-on-one-process",
        (
            Edit(CMLI, "        keys, all_image_ids, all_text_ids = texts, image_ids, text_ids\n", ""),
            Edit(
                CMLI,
                "        if self.training:\n            keys,",
                "        if is_distributed():\n            keys,",
            ),
        ),
        (state("cmli"),),
    ),
    bug(
        "codebook-wants-a-group",
        CODEBOOK,
        "        if is_distributed():\n            dist.all_reduce(brought)",
        "        dist.all_reduce(brought)",
        f"{CODEBOOK_TESTS}::test_codes_follow_as_in_a_loop",
    ),
]
