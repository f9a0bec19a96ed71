"""Stage 1 on one page (paper 3.2): three passes through the Q-Former that differ in nothing but the mask.

`Blip2Model.stage1_losses` has the same losses and gradients (tests/test_course.py) for less work: it computes the keys
and values of an image once for all passes, runs apart what a mask keeps apart (ITC's queries and text; ITG's text after
the cached queries of ITC), and compares the images and texts of all ranks. Here every pass is whole, as in Figure 2.

B images with a text each; Q queries, T text tokens, E shared embedding, W vocabulary.
"""

import torch
import torch.nn.functional as F


def plain_stage1_losses(model, images, text_ids, text_mask, image_ids, negatives):
    """The three losses of a batch -> {"itc", "itm", "itg"}; stage 1 minimises their sum.

    images (B, 3, H, W) uint8; text_ids (B, T), [CLS] ... [SEP], padded; text_mask (B, T), True = real token;
    image_ids (B,), equal for equal images; negatives: ITM's wrong partners, see `losses.draw_negatives`.
    """
    image_tokens = model.image_tokens(images)  # by the frozen ViT
    own = torch.arange(len(images), device=images.device)
    yes = torch.ones_like(own, dtype=torch.bool)

    # ITC: queries and text do not see each other. Which text of the batch belongs to this image, and vice versa?
    queries, text = model.qformer("itc", text_ids, text_mask, model.image_kv(image_tokens))
    image_feats, text_feats = model.image_feats(queries), model.text_feats(text[:, 0])  # (B, Q, E), (B, E) of [CLS]
    similarity = torch.einsum("iqe,te->itq", image_feats, text_feats).amax(dim=2) / model.temperature
    same_image = (image_ids[:, None] == image_ids).float()
    target = same_image / same_image.sum(dim=1, keepdim=True)
    i2t, t2i = (F.cross_entropy(logits, target, label_smoothing=0.1) for logits in (similarity, similarity.T))

    # ITM: all see all. Does this pair match? Each image with its text, with a wrong text, each text with a wrong image.
    image = torch.cat((own, own, negatives.images))
    words = torch.cat((own, negatives.texts, own))
    is_match = torch.cat((yes, ~yes, ~yes)).long()
    exists = torch.cat((yes, negatives.has_negative_text, negatives.has_negative_image))
    queries, _ = model.qformer("itm", text_ids[words], text_mask[words], model.image_kv(image_tokens[image]))
    match_logits = model.itm_head(queries).mean(dim=1)  # (3B, 2), the mean over the queries
    itm = F.cross_entropy(match_logits[exists], is_match[exists])

    # ITG: text sees the queries and the words before it. What is the next word?
    start = torch.full_like(text_ids[:, :1], model.qformer.dec_id)  # [DEC] in the place of [CLS]
    _, text = model.qformer("itg", torch.cat((start, text_ids[:, 1:]), dim=1), text_mask, model.image_kv(image_tokens))
    word_logits, next_ids, is_real = model.qformer.lm_logits(text[:, :-1]), text_ids[:, 1:], text_mask[:, 1:]
    itg = F.cross_entropy(word_logits[is_real], next_ids[is_real], label_smoothing=0.1)  # over W words

    return {"itc": (i2t + t2i) / 2, "itm": itm, "itg": itg}
