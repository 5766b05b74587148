"""The glossary: what every metric that a run writes means, and when to worry about it.

docs/metrics.md is made from it and explains the symbols of the formulas. A test compares it with
the metrics that runs write.

Words in capitals stand for names that a config chooses: EVAL is a name in `config.evals`; PART is a
name in `config.reward.parts` or a member of an ensemble; MODEL is `policy`, `critic` or `reward`;
METRIC is a name in `metrics` of an evaluator.
"""

import re
from typing import NamedTuple

PAGE = 'docs/metrics.md'


class Metric(NamedTuple):
  """An entry of the glossary.

  Attributes:
    name: as in metrics.jsonl, with words in capitals in place of names that a config chooses.
    meaning: one or two sentences.
    formula: in LaTeX; '' if the meaning says it all.
    unit: of the values.
    worry: which values are a reason to look closer, and what to do; '' for none.
  """

  name: str
  meaning: str
  formula: str
  unit: str
  worry: str = ''

  @property
  def anchor(self):
    """The name of its section on the page: lower case, with '-' for every other character."""
    return re.sub(r'[^a-z0-9]+', '-', self.name.lower())


OBJECTIVE = (
  Metric(
    'objective/scores',
    'The mean score of the responses, as the reward gave it.',
    r'\frac{1}{N} \sum_i r(x_i, y_i)',
    'units of the reward',
    'It should rise. If it rises while held-out or human judgement falls, the policy exploits the '
    'reward: raise `rl.kl_coef`, stop earlier, or use a better reward.',
  ),
  Metric(
    'objective/scores_std',
    'The standard deviation of the scores over the batch.',
    r'\sqrt{\frac{1}{N} \sum_i (r_i - \bar r)^2}',
    'units of the reward',
    'At 0 all responses score the same, so nothing can be learned from the batch. Look at the '
    'responses in samples.jsonl and at the reward.',
  ),
  Metric(
    'objective/postprocessed_scores',
    'The mean score after the rules of `config.rl`: `clip_scores`, `scale_scores`, `missing_eos`, '
    'and for GRPO `overlong`. The policy is trained on these scores.',
    r'\frac{1}{N} \sum_i \tilde r_i',
    'units of the reward',
    'If it is far below `objective/scores`, the rule on a missing EOS applies to many responses: '
    'see `response/eos_rate`.',
  ),
  Metric(
    'objective/kl',
    'How far the policy is from the reference: the mean over responses of the log-ratio of the '
    'two, summed over tokens (the k1 estimate, whatever `rl.kl_estimator` is). It is 0 in the '
    'first step if the reference is the initial policy.',
    r'\frac{1}{N} \sum_i \sum_t \log \frac{\pi_{\mathrm{old}}(y_{i,t} \mid x_i, y_{i,<t})}'
    r'{\pi_{\mathrm{ref}}(y_{i,t} \mid x_i, y_{i,<t})}',
    'nats per response',
    'Above about 50 (`warn.kl`) a learned reward is no longer reliable: raise `rl.kl_coef` or '
    'lower `optim.learning_rate`. A KL divergence is never negative, but an estimate of it from '
    'samples can be. A value slightly below 0, within 3 times `objective/kl_se`, is noise. A value '
    'that stays below that means that the responses were not drawn from the distribution whose '
    'log-probabilities are taken, so the KL penalty is wrong; the run logs a warning. It has two '
    'usual causes. `sampling.top_k`, `sampling.top_p` and `sampling.min_new_tokens` exclude tokens '
    'in the sampler only: turn them off. Or the sampler and the training pass compute different '
    'log-probabilities, often because of low precision: see `policy/sampler_gap`.',
  ),
  Metric(
    'objective/kl_se',
    'The standard error of `objective/kl` over the responses of the batch.',
    r'\frac{1}{\sqrt{N - 1}} \, \mathrm{std}_i \left(\sum_t \log '
    r'\frac{\pi_{\mathrm{old}}}{\pi_{\mathrm{ref}}}\right)',
    'nats per response',
    'If it is as large as the KL itself, one batch is not enough to estimate the KL: average over '
    'several steps, or raise `batch_size`.',
  ),
  Metric(
    'objective/kl_per_token',
    'The log-ratio of policy and reference, as a mean over tokens. Unlike `objective/kl` it does '
    'not grow with the length of responses.',
    r'\frac{1}{\sum_i |y_i|} \sum_{i,t} \log \frac{\pi_{\mathrm{old}}}{\pi_{\mathrm{ref}}}',
    'nats per token',
    'See `objective/kl`.',
  ),
  Metric(
    'objective/kl_coef',
    'The coefficient of the KL penalty in this step. It is constant unless `rl.kl_controller` is '
    'adaptive.',
    r'\beta',
    'units of the reward per nat',
    'If an adaptive coefficient keeps growing, the KL stays above `rl.kl_target`.',
  ),
  Metric(
    'objective/rlhf_reward',
    'What RLHF maximizes: the mean score that the policy is trained on, minus the KL penalty.',
    r'\frac{1}{N} \sum_i \tilde r_i - \beta \, \mathrm{KL}',
    'units of the reward',
    'It should rise. If it falls while `objective/scores` rises, the penalty costs more than the '
    'scores gain.',
  ),
  Metric(
    'objective/entropy_per_response',
    'The entropy of the policy at the sampling temperature, summed over the tokens of a response.',
    r'-\frac{1}{N} \sum_i \sum_t \sum_{v} \pi(v \mid x_i, y_{i,<t}) \log \pi(v \mid x_i, y_{i,<t})',
    'nats per response',
    'It grows with the length of responses. Near 0 the policy gives the same response each time: '
    'raise `rl.kl_coef`, `rl.entropy_coef` or the temperature.',
  ),
  Metric(
    'objective/skipped',
    'How many responses were left out of the update because their reward is NaN '
    "(`reward.on_nan='skip'`), or because a worker failed on them (`reward.on_error='skip'`).",
    r'\sum_i \mathbb{1}[r_i = \mathrm{NaN}]',
    'responses',
    'Anything above a few: the update sees a biased part of the batch. Fix the reward function.',
  ),
  Metric(
    'reward/PART',
    'The mean of one part of the score: a term of the weighted sum in `reward.parts`, times its '
    'weight, or a member of an ensemble (`member_0` and so on). `failed` is the fraction of '
    'responses that a worker could not score (`reward.on_error`).',
    r'\frac{1}{N} \sum_i w_k \, r_k(x_i, y_i)',
    'units of the reward',
    'If one part rises and the others fall, the policy exploits that part. If members of an '
    'ensemble drift apart, the policy has left the data that they were trained on. If `failed` '
    'rises, the policy has found responses that break the reward function; the log names some.',
  ),
)

RESPONSES = (
  Metric(
    'response/length',
    'The mean number of tokens in a response, its EOS included.',
    r'\frac{1}{N} \sum_i |y_i|',
    'tokens',
    'If it climbs to `sampling.max_new_tokens`, the reward may favour length, or the policy no '
    'longer ends its responses.',
  ),
  Metric(
    'response/eos_rate',
    'The fraction of responses that ended with an EOS or a stop string, and were not cut off.',
    r'\frac{1}{N} \sum_i \mathbb{1}[y_i \text{ ended}]',
    'fraction',
    'At 0 no response ends: raise `sampling.max_new_tokens`, or fine-tune on completions that end '
    'with an EOS. With a rule on a missing EOS (`rl.missing_eos`) all responses then get the '
    "rule's score.",
  ),
)

POLICY = (
  Metric(
    'policy/loss',
    'The policy loss: the clipped surrogate, as a mean over minibatches. For A2C it is the '
    'negative log-probability times the advantage, and for an algorithm of your own whatever its '
    'loss reports.',
    r'-\mathbb{E}_t \left[\min(\rho_t A_t, \, \mathrm{clip}(\rho_t, 1 - \epsilon_{\mathrm{low}}, '
    r'1 + \epsilon_{\mathrm{high}}) A_t)\right]',
    'units of the advantages',
    'Its value does not measure progress: advantages are centred, so it stays near 0. Watch '
    '`objective/scores` instead.',
  ),
  Metric(
    'policy/ratio',
    'The importance ratio of the trained policy to the policy that sampled, a mean over tokens and '
    'minibatches. For GSPO it is the ratio of whole sequences.',
    r'\mathbb{E}_t[\rho_t], \quad \rho_t = \frac{\pi(y_t \mid x, y_{<t})}'
    r'{\pi_{\mathrm{old}}(y_t \mid x, y_{<t})}',
    'ratio',
    'It stays near 1. Far from 1 the update is too large: lower `optim.learning_rate` or '
    '`rl.epochs`.',
  ),
  Metric(
    'policy/first_ratio',
    '`policy/ratio` of the first minibatch, before any update.',
    r'\mathbb{E}_t[\rho_t] \text{ at step } 0',
    'ratio',
    'It must be 1, up to rounding: the two policies are the same. If it is not, the sampler or the '
    'pass before the update computes otherwise than the training pass. In bfloat16 '
    "`rl.behaviour='minibatch'` keeps it at 1.",
  ),
  Metric(
    'policy/approxkl',
    'An estimate of how far the update has moved the policy from the policy that sampled, a mean '
    'over tokens and minibatches. It is not the KL from the reference.',
    r'\frac{1}{2} \, \mathbb{E}_t \left[(\log \pi - \log \pi_{\mathrm{old}})^2\right]',
    'nats per token',
    'Above about 0.1 the updates of one iteration are too large: lower `optim.learning_rate` or '
    '`rl.epochs`.',
  ),
  Metric(
    'policy/clipfrac',
    'The fraction of tokens whose loss the clip decides.',
    r'\mathbb{E}_t \left[\mathbb{1}[\text{the clipped term is the larger loss}]\right]',
    'fraction',
    'Above about 0.3 much of the update is thrown away: lower `optim.learning_rate` or '
    '`rl.epochs`. At 0 over many steps the updates may be too small.',
  ),
  Metric(
    'policy/entropy_per_token',
    'The entropy of the policy at the sampling temperature, a mean over tokens and minibatches.',
    r'-\mathbb{E}_t \sum_{v} \pi(v \mid x, y_{<t}) \log \pi(v \mid x, y_{<t})',
    'nats per token',
    'A fast fall towards 0 means that the policy collapses to few responses: raise `rl.kl_coef` or '
    '`rl.entropy_coef`.',
  ),
  Metric(
    'policy/masked_share',
    'NLPO: the share of the vocabulary that could not be sampled, a mean over tokens. The masking '
    'policy masks most of it; `sampling.top_k`, `sampling.top_p` and `sampling.min_new_tokens` the '
    'rest.',
    r'1 - \mathbb{E}_t\left[\lvert \mathcal{A}_t \rvert\right] / V',
    'fraction',
    'Near 0 the run is PPO: lower `rl.mask_top_p` or `rl.mask_min_tokens`. If it rises towards 1 '
    'while `policy/entropy_per_token` falls to 0, raise `rl.mask_min_tokens`.',
  ),
  Metric(
    'policy/sampler_gap',
    'The mean absolute difference between the log-probabilities that the sampler recorded and '
    'those of the training pass, over the same tokens.',
    r'\mathbb{E}_t \left|\log \pi_{\mathrm{sampler}} - \log \pi_{\mathrm{old}}\right|',
    'nats per token',
    'About 1e-7 in float32, 0.002 to 0.02 in bfloat16. Above `warn.sampler_gap` (0.1) the update '
    'treats the responses as samples of a policy that did not draw them. The usual causes are low '
    'precision (`model.dtype`) and `sampling.top_k`, `top_p` or `min_new_tokens`. With '
    '`sampling.staleness=1` the gap includes the update in between.',
  ),
  Metric(
    'policy/importance_weight',
    'The mean importance weight of a token: how likely it is for the policy before the update, '
    'over how likely it was for the policy that sampled it, at most `rl.importance_cap`.',
    r'\mathbb{E}_t \min\left(\frac{\pi_{\mathrm{old}}}{\pi_{\mathrm{sampler}}}, C\right)',
    'ratio',
    'Near 1. Far below 1, many tokens are capped, or `sampling.top_k` or `top_p` exclude tokens.',
  ),
  Metric(
    'policy/importance_capped',
    'The fraction of tokens whose importance weight is `rl.importance_cap`.',
    r'\mathbb{E}_t \, \mathbb{1}\left[\frac{\pi_{\mathrm{old}}}{\pi_{\mathrm{sampler}}} > '
    r'C\right]',
    'fraction',
    'Above a few percent the rollouts are too old for this learning rate.',
  ),
  Metric(
    'groups/equal',
    'GRPO: the fraction of responses whose whole group has the same score. Their advantages are 0. '
    'With `rl.max_resamples`, what is left after the last attempt. Online DPO: the fraction of '
    'prompts without a pair, which are left out.',
    r'\frac{1}{N} \sum_i \mathbb{1}[\text{all scores of the group of } i \text{ are equal}]',
    'fraction',
    'Near 1 the batch teaches nothing: the prompts are too easy or too hard for the policy.',
  ),
  Metric(
    'kept/fraction',
    'Rejection sampling: the fraction of responses that were kept.',
    '',
    'fraction',
    'At 0 nothing was learned from the batch: all scores are the lowest ones.',
  ),
  Metric(
    'kept/scores',
    'Rejection sampling: the mean score of the responses that were kept.',
    r'\frac{1}{|K|} \sum_{i \in K} \tilde r_i',
    'units of the reward',
    'If it is not above `objective/scores`, the responses to a prompt score alike: raise '
    '`sampling.samples` or `sampling.temperature`.',
  ),
  Metric(
    'groups/attempts',
    'GRPO: how many batches were sampled for this step, with `rl.max_resamples` above 0. Groups of '
    'equal scores are replaced from each.',
    '',
    'batches',
    'Each attempt costs a rollout. If it stays at its maximum, `rl.max_resamples` + 1, the prompts '
    'are too easy or too hard.',
  ),
  Metric(
    'ptx/loss',
    'The language-modelling loss on the pretraining examples that PPO-ptx mixes in.',
    r'-\mathbb{E}_t \log \pi(y_t \mid y_{<t})',
    'nats per token',
    'If it rises, the policy forgets: raise `rl.ptx_coef`.',
  ),
)

PREFERENCES = (
  Metric(
    'objective/scores_margin',
    'Online DPO: how much higher the best response to a prompt scores than the worst, a mean over '
    'pairs.',
    r'\mathbb{E}\left[\tilde r(x, y^+) - \tilde r(x, y^-)\right]',
    'units of the reward',
  ),
  Metric(
    'rewards/chosen',
    'DPO, online or not: the implicit reward of the better responses, in KTO of the desirable '
    'ones. ORPO and SimPO: beta times the mean log-probability of a token.',
    r'\beta \, \mathbb{E} \log \frac{\pi(y^+ \mid x)}{\pi_{\mathrm{ref}}(y^+ \mid x)}',
    'nats times beta',
    'If it falls far below 0, the policy makes even the better responses unlikely: lower '
    '`optim.learning_rate`, or raise beta (`dpo.beta`, online `rl.kl_coef`) or `dpo.sft_coef`.',
  ),
  Metric(
    'rewards/rejected',
    'The same for the worse responses, in KTO the undesirable ones.',
    r'\beta \, \mathbb{E} \log \frac{\pi(y^- \mid x)}{\pi_{\mathrm{ref}}(y^- \mid x)}',
    'nats times beta',
    'It should fall relative to `rewards/chosen`.',
  ),
  Metric(
    'rewards/margins',
    'The implicit reward of the better response minus that of the worse, a mean over pairs; in KTO '
    'the difference of the means of both kinds.',
    r'\beta \, \mathbb{E} \left[\log \frac{\pi(y^+ \mid x)}{\pi_{\mathrm{ref}}(y^+ \mid x)} - '
    r'\log \frac{\pi(y^- \mid x)}{\pi_{\mathrm{ref}}(y^- \mid x)}\right]',
    'nats times beta',
  ),
  Metric(
    'rewards/accuracies',
    'The fraction of pairs in which the better response has the higher implicit reward.',
    r'\mathbb{E} \, \mathbb{1}[\text{margin} > 0]',
    'fraction',
    'In the first update all implicit rewards are 0 up to rounding, so it means nothing. In online '
    'DPO pairs are new in each step, so it stays lower than on fixed pairs. If it nears 1 there, '
    'the policy has learnt the pairs by heart: see `held_out/accuracy`.',
  ),
  Metric(
    'logps/chosen',
    'The log-probability of the better responses, summed over their tokens.',
    r'\mathbb{E} \log \pi(y^+ \mid x)',
    'nats per response',
    'DPO often lowers it, since only the difference to the worse response counts. If the text gets '
    'worse, set `dpo.sft_coef`.',
  ),
  Metric(
    'logps/rejected',
    'The log-probability of the worse responses, summed over their tokens.',
    r'\mathbb{E} \log \pi(y^- \mid x)',
    'nats per response',
  ),
  Metric(
    'sft/loss',
    'The SFT loss on the better responses that `dpo.sft_coef` adds: a mean over the tokens of each '
    'response, then over responses.',
    r'-\mathbb{E} \frac{1}{|y^+|} \log \pi(y^+ \mid x)',
    'nats per token',
  ),
  Metric(
    'kto/kl',
    'The reference point of KTO: the KL from the reference, estimated on completions of other '
    'prompts, and 0 if the estimate is negative.',
    r'\max\left(0, \mathbb{E} \log \frac{\pi(y_j \mid x_i)}{\pi_{\mathrm{ref}}(y_j \mid x_i)}'
    r'\right), \quad j \ne i',
    'nats per response',
    'It is small, since the completions of other prompts are unlikely before and after training. '
    "The evaluator 'prompts' estimates the KL on the policy's own responses.",
  ),
)

DISTILLATION = (
  Metric(
    'distillation/loss',
    'The divergence of the student from the teacher that `distillation.loss` names, before the '
    'update. The samples of the student are new in each step, so it measures no overfitting.',
    r'\mathbb{E}_t \, D(\pi(\cdot \mid x, y_{<t}), \pi_{\mathrm{teacher}}(\cdot \mid x, y_{<t}))',
    'nats per token',
    'It should fall quickly and then level off; what remains is what the student cannot represent. '
    'If it rises, lower `optim.learning_rate`.',
  ),
  Metric(
    'distillation/reverse_kl',
    'The KL divergence of the student from the teacher, over the whole vocabulary. It is large if '
    'the student gives probability to tokens that the teacher excludes.',
    r'\mathbb{E}_t \sum_v \pi(v) \log \frac{\pi(v)}{\pi_{\mathrm{teacher}}(v)}',
    'nats per token',
    'See `distillation/loss`.',
  ),
  Metric(
    'distillation/forward_kl',
    'The KL divergence of the teacher from the student, over the whole vocabulary. It is large if '
    'the student excludes tokens to which the teacher gives probability.',
    r'\mathbb{E}_t \sum_v \pi_{\mathrm{teacher}}(v) \log '
    r'\frac{\pi_{\mathrm{teacher}}(v)}{\pi(v)}',
    'nats per token',
    'If it grows while `distillation/reverse_kl` falls, the student covers fewer and fewer of the '
    "teacher's answers: try `distillation.loss='jsd'`.",
  ),
)

TRUST_REGION = (
  Metric(
    'trust_region/accepted',
    'TRPO: whether the line search found a step. If not, the policy did not change.',
    '',
    '0 or 1',
    'If it is often 0, raise `rl.cg_damping` or `rl.cg_steps`, or lower `rl.max_kl`.',
  ),
  Metric(
    'trust_region/attempts',
    'TRPO: attempts of the line search; 0 if the gradient is 0.',
    '',
    'attempts',
    'More than about 3 mean that the quadratic model of the KL is poor: see '
    '`trust_region/residual`, or lower `rl.max_kl`.',
  ),
  Metric(
    'trust_region/step_size',
    'TRPO: the factor of the natural gradient in the accepted step, after the line search.',
    r'0.8^k \sqrt{2 \, \mathrm{KL}_{\max} / x^T (F + \lambda I) x}',
    '1 / (units of the surrogate)',
  ),
  Metric(
    'trust_region/kl',
    'TRPO: the KL over the whole vocabulary from the policy before the step to the policy after '
    'it, a mean over tokens.',
    r'\mathbb{E}_t \, \mathrm{KL}\left(\pi_{\mathrm{old}}(\cdot \mid x, y_{<t}) \,\|\, '
    r'\pi(\cdot \mid x, y_{<t})\right)',
    'nats per token',
    'It is below `rl.max_kl`, and 0 for a rejected step. If it is far below, the damping is large '
    'or the line search shrinks every step.',
  ),
  Metric(
    'trust_region/improvement',
    'TRPO: how much the accepted step improves the surrogate.',
    r'\mathbb{E}_t \left[\frac{\pi(y_t)}{\pi_{\mathrm{old}}(y_t)} A_t\right] - \mathbb{E}_t[A_t]',
    'advantages',
  ),
  Metric(
    'trust_region/residual',
    'TRPO: how far conjugate gradients are from the solution.',
    r'\|g - (F + \lambda I) x\| / \|g\|',
    'fraction',
    'Above about 0.1 the direction is far from the natural gradient: raise `rl.cg_steps` or '
    '`rl.cg_damping`.',
  ),
)

CRITIC = (
  Metric(
    'value/loss',
    'The loss of the critic, as a mean over positions and minibatches. For A2C it is the squared '
    'error, without the factor 1/2 and without clipping.',
    r'\frac{1}{2} \, \mathbb{E}_t \max\left((V_t - G_t)^2, \, '
    r'(\mathrm{clip}(V_t, V_t^{\mathrm{old}} \pm \epsilon_V) - G_t)^2\right)',
    'squared units of the reward',
    'Compare it with `returns/var`: half of that is the loss of a critic that predicts the mean.',
  ),
  Metric(
    'value/explained_variance',
    'How much of the variance of the returns the critic predicts, before the update.',
    r'1 - \frac{\mathrm{Var}[G_t - V_t]}{\mathrm{Var}[G_t]}',
    'fraction, at most 1',
    'It should rise from about 0 towards 1. If it stays below 0, the critic is worse than a '
    'constant: raise `critic.learning_rate` or `rl.vf_coef`, or start it from the reward model.',
  ),
  Metric(
    'value/clipfrac',
    'The fraction of positions where the clip of the value decides the loss.',
    r'\mathbb{E}_t \left[\mathbb{1}[\text{the clipped square is the larger}]\right]',
    'fraction',
    'A high fraction in early steps slows the critic down: raise `rl.value_clip`.',
  ),
  Metric(
    'value/mean',
    'The mean value that the critic predicts during the update.',
    r'\mathbb{E}_t[V_t]',
    'units of the reward',
    'It should follow `returns/mean`.',
  ),
  Metric(
    'returns/mean',
    'The mean return: with a critic, what it is trained to predict. For REINFORCE, the mean over '
    "tokens of the rewards that follow, or over responses with `rl.returns='sequence'`.",
    r'\mathbb{E}_t[G_t], \quad G_t = A_t + V_t',
    'units of the reward',
  ),
  Metric(
    'returns/baseline',
    'REINFORCE: the baseline that is subtracted from the returns. Of groups it is the mean of all.',
    r'b',
    'units of the reward',
    'It should be near `returns/mean`. A moving average that lags behind needs a lower '
    '`rl.baseline_decay`.',
  ),
  Metric(
    'returns/var',
    'The variance of the returns.',
    r'\mathrm{Var}[G_t]',
    'squared units of the reward',
  ),
)

LANGUAGE_MODEL = (
  Metric(
    'loss',
    'The loss of the batch. Pretraining and SFT: the negative log-likelihood of the target tokens. '
    'Reward model: the loss that `preference.loss` names, a mean over prompts. DPO: the loss that '
    '`dpo.loss` names, a mean over pairs or labelled completions, with the SFT term. ILQL: the '
    'weighted sum of its parts.',
    r'-\mathbb{E}_t \log \pi(y_t \mid y_{<t})',
    'nats per token; reward model: nats, or squared units of the ratings; DPO: depends on the loss',
    'A constant scorer has a pairwise loss of log 2 = 0.693 on pairs, and so has DPO at the start. '
    'KTO starts at 0.5, IPO at 1 / (4 beta^2). If the loss falls here and '
    'rises in `held_out/loss`, the model overfits.',
  ),
  Metric(
    'perplexity',
    'The exponential of the loss of pretraining or SFT.',
    r'\exp(\text{loss})',
    'equally likely tokens',
    'If it is as large as the vocabulary, the model has learned nothing.',
  ),
  Metric(
    'tokens',
    'Pretraining and SFT: target tokens of the batch. ILQL: actions of the batch. Reward model and '
    'DPO: tokens that they read.',
    '',
    'tokens',
  ),
  Metric(
    'fill',
    'The fraction of positions in the batch that hold a token and not padding.',
    '',
    'fraction',
    'If it is low, most of the computation is wasted: lower `data.max_length`.',
  ),
)

REWARD_MODEL = (
  Metric(
    'accuracy',
    'Reward model: the fraction of pairs of the batch in which the preferred completion scores '
    'higher. A tie counts as wrong.',
    r'\frac{1}{n} \sum_{\mathrm{pairs}} \mathbb{1}[r_{\mathrm{chosen}} > r_{\mathrm{rejected}}]',
    'fraction',
    'At 0.5 the model guesses. Far above `held_out/accuracy` it overfits.',
  ),
  Metric(
    'ties',
    'Reward model: the fraction of pairs of the batch whose scores are exactly equal.',
    r'\frac{1}{n} \sum_{\mathrm{pairs}} \mathbb{1}[r_{\mathrm{chosen}} = r_{\mathrm{rejected}}]',
    'fraction',
    'Above 0 the model does not see a difference, such as when `data.max_length` cuts it off.',
  ),
  Metric(
    'margin',
    'Reward model: the mean difference of the scores of the two completions of a pair.',
    r'\frac{1}{n} \sum_{\mathrm{pairs}} (r_{\mathrm{chosen}} - r_{\mathrm{rejected}})',
    'units of the score; log-odds for the pairwise loss',
  ),
  Metric(
    'scores/mean',
    'Reward model: the mean score of all completions in the batch.',
    r'\mathbb{E}[r]',
    'units of the score',
    'Only differences of scores are trained, so it may drift: `preference.centering` holds it near '
    '0, and `preference.normalize` shifts it at the end.',
  ),
  Metric(
    'scores/std_of_heads',
    'Reward model with several heads: the standard deviation of a score over heads, averaged over '
    'the completions in the batch.',
    r'\mathbb{E}[\mathrm{std}_{\mathrm{heads}}(r)]',
    'units of the score',
    'Near 0 all heads are the same model. A smaller `preference.head_fraction` makes them differ.',
  ),
  Metric(
    'reliability/lowest',
    'Reward model with `preference.reliability`: the lowest reliability of an annotator. The mean '
    'of all is 1.',
    r'\min_k \beta_k',
    'inverse temperature',
    'Near 0 the annotator chooses at random; below 0 the annotator prefers what others reject. '
    'annotators.json in the folder of the run has all of them.',
  ),
  Metric(
    'reliability/highest',
    'Reward model with `preference.reliability`: the highest reliability of an annotator.',
    r'\max_k \beta_k',
    'inverse temperature',
  ),
)

ILQL = (
  Metric(
    'v/loss',
    'ILQL: the asymmetric squared error of V, a mean over actions.',
    r'\mathbb{E} \, |\tau - \mathbb{1}[\hat Q < V]| \, (\hat Q - V)^2',
    'squared units of the reward',
  ),
  Metric(
    'v/mean',
    'ILQL: the mean of V before the actions of the batch.',
    r'\mathbb{E}[V(s)]',
    'units of the reward, standardized if `ilql.standardize`',
    'If it grows without end, so do Q and its targets: lower `optim.learning_rate` or '
    '`ilql.target_alpha`.',
  ),
  Metric(
    'q/loss',
    'ILQL: the squared errors of both Q heads, a mean over actions.',
    r"\mathbb{E} \sum_i (r + \gamma V(s') - Q_i(s, a))^2",
    'squared units of the reward',
    'It cannot reach 0 if rewards are random. If it rises, see `v/mean`.',
  ),
  Metric(
    'q/cql_loss',
    'ILQL: the cross-entropy of both Q heads at the action, which keeps the Q of actions that are '
    'not in the data below those that are.',
    r'\mathbb{E} \sum_i \left(\log \sum_b e^{Q_i(s, b)} - Q_i(s, a)\right)',
    'nats per token',
    "Near 2 times the log of the vocabulary the heads prefer no action. Far below the policy's "
    '`policy/awac_loss` they only imitate the data: lower `ilql.cql_coef`.',
  ),
  Metric(
    'q/mean',
    'ILQL: the mean of both Q heads at the actions of the batch.',
    r'\mathbb{E} \, \tfrac{1}{2} (Q_1 + Q_2)',
    'units of the reward, standardized if `ilql.standardize`',
  ),
  Metric(
    'q/target_mean',
    'ILQL: the mean of the smaller target Q at the actions of the batch.',
    r'\mathbb{E}[\hat Q(s, a)]',
    'units of the reward, standardized if `ilql.standardize`',
    'Far from `q/mean` the targets are too slow: raise `ilql.target_alpha`.',
  ),
  Metric(
    'policy/awac_loss',
    'ILQL: the weighted negative log-likelihood of the actions. With `ilql.awac_beta` 0 it is that '
    'of SFT.',
    r'\mathbb{E} \, e^{\beta_w (\hat Q - V)} (-\log \pi(a \mid s))',
    'nats per token',
  ),
  Metric(
    'policy/awac_weight',
    'ILQL: the mean weight of an action in the policy loss, 1 if `ilql.awac_beta` is 0.',
    r'\mathbb{E} \, e^{\beta_w (\hat Q - V)}',
    'factor',
    'If it is far above 1, a few actions decide the update: lower `ilql.awac_beta`.',
  ),
)

EVALUATORS = (
  Metric(
    'EVAL/loss',
    "Evaluator `loss`: the algorithm's loss on the held-out data.",
    '',
    'as `loss`',
    'If it rises while `loss` falls, the model overfits: stop earlier, or use more data.',
  ),
  Metric(
    'EVAL/v_loss',
    'Evaluator `loss` of ILQL: `v/loss` on the held-out data, with the targets of the run.',
    '',
    'as `v/loss`',
  ),
  Metric(
    'EVAL/q_loss',
    'Evaluator `loss` of ILQL: `q/loss` on the held-out data.',
    '',
    'as `q/loss`',
    'Far above `q/loss` the value functions overfit: use more data or fewer steps.',
  ),
  Metric(
    'EVAL/cql_loss',
    'Evaluator `loss` of ILQL: `q/cql_loss` on the held-out data.',
    '',
    'as `q/cql_loss`',
  ),
  Metric(
    'EVAL/awac_loss',
    'Evaluator `loss` of ILQL: `policy/awac_loss` on the held-out data.',
    '',
    'as `policy/awac_loss`',
  ),
  Metric(
    'EVAL/perplexity',
    'Evaluator `loss` of pretraining and SFT: the exponential of the held-out loss.',
    r'\exp(\text{loss})',
    'equally likely tokens',
  ),
  Metric(
    'EVAL/prompts',
    'Evaluator `loss` of a reward model: the held-out prompts that have a loss.',
    '',
    'prompts',
  ),
  Metric(
    'EVAL/pairs',
    'Evaluator `loss` of a reward model or of DPO: the held-out pairs.',
    '',
    'pairs',
    'With fewer than 100 the interval of the accuracy is wide.',
  ),
  Metric(
    'EVAL/accuracy',
    'Evaluator `loss` of a reward model or of DPO: the fraction of held-out pairs in which the '
    'preferred completion has the higher score or implicit reward. A tie counts as wrong.',
    r'\frac{1}{n} \sum_{\mathrm{pairs}} \mathbb{1}[r_{\mathrm{chosen}} > r_{\mathrm{rejected}}]',
    'fraction',
    'On pairs that people judged, 60 to 80 % is usual: people do not agree more often. At 0.5 the '
    'model guesses.',
  ),
  Metric(
    'EVAL/accuracy_low',
    'The lower end of the 95 % interval of the accuracy, over prompts.',
    '',
    'fraction',
    'If it is below 0.5, the data do not show that the model has learned anything.',
  ),
  Metric(
    'EVAL/accuracy_high',
    'The upper end of the 95 % interval of the accuracy.',
    '',
    'fraction',
  ),
  Metric(
    'EVAL/ties',
    'Evaluator `loss` of a reward model: the fraction of held-out pairs with equal scores.',
    r'\frac{1}{n} \sum_{\mathrm{pairs}} \mathbb{1}[r_{\mathrm{chosen}} = r_{\mathrm{rejected}}]',
    'fraction',
    'See `ties`.',
  ),
  Metric(
    'EVAL/margin',
    'Evaluator `loss` of a reward model or of DPO: the mean difference of scores or implicit '
    'rewards of the held-out pairs; in KTO of the desirable and the undesirable completions.',
    r'\frac{1}{n} \sum_{\mathrm{pairs}} (r_{\mathrm{chosen}} - r_{\mathrm{rejected}})',
    'units of the score; DPO: nats times beta',
  ),
  Metric(
    'EVAL/kto_kl',
    'Evaluator `loss` of KTO: `kto/kl` on the held-out data.',
    '',
    'nats per response',
  ),
  Metric(
    'EVAL/completions',
    'Evaluator `loss` of KTO: the held-out completions.',
    '',
    'completions',
  ),
  Metric(
    'EVAL/ece',
    'Evaluator `loss` of a reward model: the expected calibration error over 10 bins of the '
    'confidence, the probability that the model gives to the completion it prefers.',
    r'\sum_b \frac{n_b}{n} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|, \quad '
    r'\text{confidence} = \sigma(|r_{\mathrm{chosen}} - r_{\mathrm{rejected}}|)',
    'fraction',
    'Above about 0.1 the differences of scores are no log-odds. An overconfident model '
    'needs fewer steps or `preference.label_smoothing`.',
  ),
  Metric(
    'EVAL/ratings',
    'Evaluator `loss` of a reward model of ratings: the held-out ratings.',
    '',
    'ratings',
  ),
  Metric(
    'EVAL/bias',
    'Evaluator `loss` of a reward model of ratings: the mean of score minus rating.',
    r'\mathbb{E}[r - \text{rating}]',
    'units of the ratings',
    'Far from 0 the held-out ratings differ from those that the model was trained on.',
  ),
  Metric(
    'EVAL/correlation',
    "Evaluator `loss` of a reward model of ratings: Pearson's correlation of scores and ratings.",
    r'\mathrm{corr}(r, \text{rating})',
    'from -1 to 1',
    'Near 0 the model has learned nothing.',
  ),
  Metric(
    'EVAL/rating_error',
    'Evaluator `loss` of a reward model of ratings: the calibration error, over 10 bins of equal '
    'count in the order of the scores.',
    r'\sum_b \frac{n_b}{n} \, |\bar r_b - \overline{\text{rating}}_b|',
    'units of the ratings',
  ),
  Metric(
    'EVAL/score',
    'Evaluator `prompts`: the mean score of the responses to held-out prompts. Every evaluation '
    'uses the same random keys.',
    r'\mathbb{E}[r(x, y)]',
    'units of the reward of the evaluator',
    'If it falls while `objective/scores` rises, the policy exploits the reward that it is trained '
    'on.',
  ),
  Metric(
    'EVAL/score_se',
    'The standard error of the score, over prompts.',
    '',
    'units of the reward of the evaluator',
  ),
  Metric(
    'EVAL/kl',
    'Evaluator `prompts`: the KL of the policy from the initial policy, estimated on the '
    'responses at the sampling temperature.',
    r'\mathbb{E}_y \left[\log \frac{\pi(y \mid x)}{\pi_{\mathrm{start}}(y \mid x)}\right]',
    'nats per response',
    'See `objective/kl`, also for values below 0.',
  ),
  Metric(
    'EVAL/length',
    'Evaluator `prompts`: the mean number of tokens in an answer.',
    '',
    'tokens',
    'See `response/length`.',
  ),
  Metric(
    'EVAL/eos_rate',
    'Evaluator `prompts`: the fraction of responses that ended by themselves.',
    '',
    'fraction',
    'See `response/eos_rate`.',
  ),
  Metric(
    'EVAL/rate',
    "Evaluator `win_rate`: how often the policy's answer scores higher than the answer of the "
    'policy as it started. A draw counts one half.',
    r'\frac{\text{wins} + \text{draws} / 2}{\text{prompts}}',
    'fraction',
    'Below 0.5 training has made the policy worse by this judge.',
  ),
  Metric(
    'EVAL/low',
    'The lower end of the 95 % interval of the win rate, over prompts.',
    '',
    'fraction',
    'If 0.5 is between `low` and `high`, the data do not tell the two policies apart.',
  ),
  Metric(
    'EVAL/high',
    'The upper end of the 95 % interval of the win rate.',
    '',
    'fraction',
  ),
  Metric(
    'EVAL/draws',
    'Evaluator `win_rate`: the fraction of prompts where both responses score the same.',
    '',
    'fraction',
    'Near 1 the judge cannot tell the responses apart, or the responses are the same.',
  ),
  Metric(
    'EVAL/distinct_1',
    'Evaluator `text`: distinct words divided by all words of the responses.',
    r'\frac{|\text{different 1-grams}|}{|\text{1-grams}|}',
    'fraction',
    'A fall means less variety. It falls with the number of texts: compare equal sets only.',
  ),
  Metric(
    'EVAL/distinct_2',
    'Evaluator `text`: different pairs of adjacent words over all such pairs.',
    r'\frac{|\text{different 2-grams}|}{|\text{2-grams}|}',
    'fraction',
    'See `EVAL/distinct_1`.',
  ),
  Metric(
    'EVAL/entropy_1',
    'Evaluator `text`: the entropy of the distribution of words over all answers.',
    r'-\sum_g p(g) \log p(g)',
    'nats',
    'A fall means less variety. It grows with the number of texts: compare equal sets only.',
  ),
  Metric(
    'EVAL/entropy_2',
    'Evaluator `text`: the same for pairs of adjacent words.',
    r'-\sum_g p(g) \log p(g)',
    'nats',
    'See `EVAL/entropy_1`.',
  ),
  Metric(
    'EVAL/msttr',
    'Evaluator `text`: different words over words in segments of 100 words of all answers in '
    'order, a mean over segments. Unlike `EVAL/distinct_1` it does not depend on the number of '
    'texts.',
    r'\frac{1}{S} \sum_s \frac{|\text{different words of } s|}{100}',
    'fraction',
    'A fall means less variety.',
  ),
  Metric(
    'EVAL/mean_words',
    'Evaluator `text`: the mean number of words in an answer.',
    '',
    'words',
  ),
  Metric(
    'EVAL/repetition_3',
    'Evaluator `text`: the fraction of the 3-grams of an answer that occur earlier in it, a mean '
    'over responses.',
    r'1 - \frac{|\text{different 3-grams}|}{|\text{3-grams}|}',
    'fraction',
    'A rise means that responses repeat themselves.',
  ),
  Metric(
    'EVAL/unique',
    'Evaluator `text`: the number of distinct texts divided by that of responses.',
    '',
    'fraction',
    'A fall towards 0 means that the policy gives the same answer to every prompt.',
  ),
  Metric(
    'EVAL/empty',
    'Evaluator `text`: the fraction of responses without any text.',
    '',
    'fraction',
    'A rise means that the policy learns to end at once.',
  ),
  Metric(
    'EVAL/metrics/METRIC',
    'Evaluator `text`: a metric of all answers together, such as BLEU or ROUGE; METRIC is a name '
    'in `evals.NAME.metrics`.',
    '',
    'units of the metric',
  ),
)

OPTIMIZER = (
  Metric(
    'MODEL/grad_norm',
    'The norm of the gradients before they are clipped, a mean over minibatches.',
    r'\lVert g \rVert_2',
    'units of the loss per unit of a parameter',
    'Spikes come before a run diverges: set `optim.clip_norm` or lower `optim.learning_rate`. At 0 '
    'nothing is learned.',
  ),
  Metric(
    'MODEL/update_norm',
    'The norm of the change of the parameters, a mean over minibatches.',
    r'\lVert \Delta\theta \rVert_2',
    'units of a parameter',
    'Above about 1 % of `MODEL/param_norm` a step is large.',
  ),
  Metric(
    'MODEL/param_norm',
    'The norm of the trained parameters after the update.',
    r'\lVert \theta \rVert_2',
    'units of a parameter',
  ),
)

TIMES = (
  Metric(
    'seconds/step',
    'Wall time of a step, a mean over the steps since the last logged one. It includes evaluations '
    'and checkpoints.',
    '',
    'seconds',
  ),
  Metric(
    'seconds/rollout',
    'Time to sample the responses of a step. The first one includes compilation. With '
    '`sampling.staleness=1` it is the time that the loop waits for the next responses after it has '
    'scored those of this step.',
    '',
    'seconds',
    'If it is most of a step, try `sampling.max_concurrent` and `sampling.gather_weights`.',
  ),
  Metric(
    'seconds/scoring',
    'Time to score the responses of a step.',
    '',
    'seconds',
    'If a reward function takes most of a step, make it work on the whole batch at once, or sample '
    'the next responses meanwhile: `sampling.staleness=1`.',
  ),
  Metric(
    'seconds/update',
    'Time of the train step on the device. The first one includes compilation.',
    '',
    'seconds',
  ),
  Metric(
    'tokens_per_second/rollout',
    'Response tokens over `seconds/rollout`. Not logged with `sampling.staleness=1`.',
    '',
    'tokens per second',
  ),
  Metric(
    'tokens_per_second/update',
    '`tokens` over `seconds/update`.',
    '',
    'tokens per second',
  ),
  Metric(
    'memory/peak_gib',
    'Most memory in use so far, of the fullest device of this process; on CPU, of the process.',
    '',
    'GiB',
    'If it is close to the memory of the device, set `microbatch_size`.',
  ),
)

GROUPS = {
  'Scores and KL': OBJECTIVE,
  'Responses': RESPONSES,
  'Policy': POLICY,
  'Preferences': PREFERENCES,
  'Distillation': DISTILLATION,
  'Trust region': TRUST_REGION,
  'Critic': CRITIC,
  'Pretraining and SFT': LANGUAGE_MODEL,
  'Reward models': REWARD_MODEL,
  'ILQL': ILQL,
  'Evaluators': EVALUATORS,
  'Optimizer': OPTIMIZER,
  'Time and memory': TIMES,
}
METRICS = tuple(metric for metrics in GROUPS.values() for metric in metrics)


_EXACT = {metric.name: metric for metric in METRICS}
# `policy/score` is not a metric of an evaluator, nor `reward/grad_norm` a part of a score.
_PREFIXES = '|'.join(sorted({name.split('/')[0] for name in _EXACT}))
_NAMES = {
  'EVAL': rf'(?!(?:{_PREFIXES})/)[^/]+',
  'MODEL': '[^/]+',
  'PART': '(?!(?:grad|update|param)_norm$).+',
  'METRIC': '[^/]+',
}


def find(name):
  """Finds the entry of a metric.

  Args:
    name: as in metrics.jsonl, such as 'objective/kl' or 'held_out/loss'.

  Returns:
    Metric, or None if there is no entry, as for the metrics of a user's own evaluator.
  """
  if name in _EXACT:
    return _EXACT[name]
  return next((metric for metric in METRICS if _pattern(metric).fullmatch(name)), None)


def link(name):
  """Returns where a metric is explained, such as 'docs/metrics.md#objective-kl'; '' if nowhere."""
  metric = find(name)
  return f'{PAGE}#{metric.anchor}' if metric else ''


def _pattern(metric):
  """Returns a regex of the names that an entry is for."""
  return re.compile('/'.join(_NAMES.get(part, re.escape(part)) for part in metric.name.split('/')))
