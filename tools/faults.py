"""The faults that mutants.py applies, in wiring and edge cases that tests of formulas miss."""

from typing import NamedTuple


class Fault(NamedTuple):
  """A fault, and the tests that must fail with it.

  Attributes:
    name: Description of the fault.
    file: Path in the tree.
    old: Text that occurs exactly once in the file.
    new: Text that replaces it.
    tests: Node ids of the nearest tests.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


def _tests(file, *names):
  return tuple(f'tests/{file}.py::{name}' for name in names)


_BY_HAND = _tests(
  'algorithms/test_ppo_by_hand',
  *(
    f'test_two_iterations_agree[{name}]'
    for name in ('n_plus', 'openai2019', 'dense rewards, full KL, per-token controller')
  ),
)

FAULTS = (
  # Trust regions and preference pairs.
  Fault(
    'the Fisher matrix lacks the outer product of the probabilities',
    'rlhf_jax/logprobs.py',
    'w = p * (u - jnp.sum(p * u, axis=-1, keepdims=True))',
    'w = p * u',
    _tests('test_trust_region', 'test_products_are_those_of_the_explicit_fisher_matrix[all]'),
  ),
  Fault(
    'the line search ignores the bound on the KL',
    'rlhf_jax/trust_region.py',
    'accepted = (surrogate > before) & (kl < region.max_kl)',
    'accepted = surrogate > before',
    _tests('test_trust_region', 'test_line_search_by_hand'),
  ),
  Fault(
    'a failed line search keeps its last attempt',
    'rlhf_jax/trust_region.py',
    'return jax.tree.map(keep, result, start), {',
    'return result, {',
    _tests('algorithms/test_trpo', 'test_a_rejected_step_restores_the_last_bit'),
  ),
  Fault(
    'the reference point of KTO is that of the labelled completions',
    'rlhf_jax/algorithms/dpo.py',
    'trained, mismatched = lane(batch, 0), lane(batch, 1)',
    'trained, mismatched = lane(batch, 0), lane(batch, 0)',
    _tests('algorithms/test_dpo', 'test_an_update_of_kto_has_the_loss_and_metrics_of_a_loop'),
  ),
  Fault(
    'log-probabilities of a reference with other weights are accepted',
    'rlhf_jax/algorithms/reference_logprobs.py',
    'return checksums.of_json([model, sums])',
    'return checksums.of_json([model, sorted(sums)])',
    _tests(
      'algorithms/test_dpo',
      'test_those_of_another_model_or_other_data_are_refused[model]',
    ),
  ),
  Fault(
    'a microbatch of packed pairs is a mean of its own',
    'rlhf_jax/algorithms/dpo.py',
    'loss = adv.masked_sum(example_losses(values, rows, settings, kl), rows.present) / count',
    'loss = adv.masked_mean(example_losses(values, rows, settings, kl), rows.present)',
    _tests(
      'algorithms/test_dpo', 'test_an_update_has_the_loss_and_metrics_of_a_loop[orpo, packed]'
    ),
  ),
  Fault(
    'the two responses of a pair are shuffled apart',
    'rlhf_jax/algorithms/online_dpo.py',
    'group_size=self.samples',
    'group_size=1',
    _tests('algorithms/test_online_dpo', 'test_an_update_in_two_minibatches_is_two_steps_by_hand'),
  ),
  # Distillation.
  Fault(
    'the teacher reads the prompts of the student, without the context',
    'rlhf_jax/algorithms/distillation.py',
    'if batches[0][1] is not None:',
    'if False:',
    _tests(
      'algorithms/test_distillation',
      'test_a_train_step_agrees_with_loops_over_single_sequences[llama]',
    ),
  ),
  Fault(
    'the generalized divergence swaps the weights of teacher and student',
    'rlhf_jax/losses.py',
    'return beta * kl(teacher, mixture) + (1.0 - beta) * kl(student, mixture)',
    'return (1.0 - beta) * kl(teacher, mixture) + beta * kl(student, mixture)',
    _tests(
      'algorithms/test_distillation', 'test_divergences_and_gradients_agree_with_trl[jsd_0.1]'
    ),
  ),
  Fault(
    'the teacher of a context is the student itself, not a copy',
    'rlhf_jax/algorithms/distillation.py',
    'return student, trainable.merge(frozen, jax.tree.map(jnp.copy, trained))',
    'return student, trainable.merge(frozen, trained)',
    _tests('algorithms/test_distillation', 'test_a_student_learns_a_context[full]'),
  ),
  Fault(
    'batches of samples and of data are padded at the wrong side of their prompts',
    'rlhf_jax/algorithms/distillation_data.py',
    'jnp.pad(x, ((0, 0), (left, right)))',
    'jnp.pad(x, ((0, 0), (0, left + right)))',
    _tests(
      'algorithms/test_distillation', 'test_a_train_step_agrees_with_loops_over_single_sequences'
    ),
  ),
  # The reference.
  Fault(
    'the reference has the adapters of the policy',
    'rlhf_jax/forward.py',
    "if not trainable.has_adapters(self.frozen['reference']):",
    'if False:',
    _tests('algorithms/test_reference_policy', 'test_the_reference_is_the_initial_policy'),
  ),
  Fault(
    'the reference samples at temperature 1',
    'rlhf_jax/forward.py',
    'unembed, states, batch.tokens[:, -length:], temperature=self.temperature',
    'unembed, states, batch.tokens[:, -length:], temperature=1.0',
    _tests('algorithms/test_reference_policy', 'test_the_reference_is_the_initial_policy'),
  ),
  # Algorithms without a critic.
  Fault(
    'the moving baseline contains the batch itself',
    'rlhf_jax/algorithms/reinforce.py',
    "'moving': before",
    "'moving': after",
    _tests('algorithms/test_reinforce', 'test_advantages_agree_with_loops[token-moving]'),
  ),
  Fault(
    'the leave-one-out baseline contains the response itself',
    'rlhf_jax/advantages.py',
    '(total - groups) / jnp.maximum(others, 1)',
    'total / jnp.maximum(others + 1, 1)',
    _tests('test_advantages', 'test_leave_one_out_agrees_with_loops'),
  ),
  Fault(
    'the importance weight of CISPO has a gradient',
    'rlhf_jax/losses.py',
    'jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))',
    'jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)',
    _tests('algorithms/test_grpo', 'test_loss_and_gradient_are_those_of_trl[cispo]'),
  ),
  Fault(
    'all attempts of dynamic sampling have the same key',
    'rlhf_jax/rollout/resampling.py',
    'jax.random.fold_in(key, attempts),',
    'key,',
    _tests(
      'rollout/test_resampling',
      'test_attempts_have_keys_of_their_own_and_the_same_when_repeated',
    ),
  ),
  Fault(
    'a group of dynamic sampling is filled once more',
    'rlhf_jax/rollout/resampling.py',
    'wasted = np.concatenate([wasted, new_wasted])[index]',
    'wasted = wasted | False',
    _tests('rollout/test_resampling', 'test_groups_are_those_of_a_loop[one equal]'),
  ),
  # Evaluation.
  Fault(
    'best-of-n selects the worst sample',
    'rlhf_jax/evaluation/comparison.py',
    '.argmax(axis=1)',
    '.argmin(axis=1)',
    _tests('evaluation/test_policies', 'test_the_best_of_n_is_the_best_by_the_reward_model'),
  ),
  Fault(
    'the KL of best-of-n is only log n',
    'rlhf_jax/evaluation/best_of_n.py',
    'return math.log(n) - (n - 1) / n',
    'return math.log(n)',
    _tests('evaluation/test_policies', 'test_the_best_of_n_is_the_best_by_the_reward_model'),
  ),
  Fault(
    'policy and reference of a KL are swapped',
    'rlhf_jax/evaluation/comparison.py',
    'mean_kl(policies[name], policies[baseline],',
    'mean_kl(policies[baseline], policies[name],',
    _tests('evaluation/test_policies', 'test_the_kl_is_of_the_policy_from_the_baseline'),
  ),
  Fault(
    'the KL uses the reference at temperature 1',
    'rlhf_jax/evaluation/comparison.py',
    'reference.rollout_logprobs(rollout, temperature=temperature)',
    'reference.rollout_logprobs(rollout)',
    _tests('evaluation/test_policies', 'test_the_kl_is_of_the_policy_from_the_baseline'),
  ),
  Fault(
    'comparisons of the evaluation always end with the EOS',
    'rlhf_jax/evaluation/policies.py',
    'append_eos=truncate_at is None',
    'append_eos=True',
    _tests('evaluation/test_policies', 'test_comparisons_are_scored_like_responses'),
  ),
  Fault(
    'pairs of later batches get the prompts of the first batch',
    'rlhf_jax/evaluation/reward_models.py',
    'first += len(scores)',
    'first += 0',
    _tests('evaluation/test_policies', 'test_each_gap_has_its_own_prompt_in_every_batch'),
  ),
  Fault(
    'the report shows texts after training as texts before it',
    'rlhf_jax/evaluation/comparison.py',
    "'before': before.samples.responses[i]",
    "'before': after.samples.responses[i]",
    _tests('evaluation/test_policies', 'test_texts_before_and_after_have_their_own_scores'),
  ),
  Fault(
    'a score difference equal to the tolerance is a win',
    'rlhf_jax/evaluation/winrate.py',
    'difference > tolerance',
    'difference >= tolerance',
    _tests('evaluation/test_winrate', 'test_tolerance_and_infinities'),
  ),
  Fault(
    'a score difference equal to the tolerance is a loss',
    'rlhf_jax/evaluation/winrate.py',
    'difference < -tolerance',
    'difference <= -tolerance',
    _tests('evaluation/test_winrate', 'test_tolerance_and_infinities'),
  ),
  Fault(
    'intervals of Elo ratings cover 90 %',
    'rlhf_jax/feedback/elo.py',
    'float(elo - z * se), float(elo + z * se)',
    'float(elo - 0.84 * z * se), float(elo + 0.84 * z * se)',
    _tests('feedback/test_elo', 'test_intervals_cover_95_percent_of_resamples'),
  ),
  Fault(
    "evaluators ignore the run's sampling settings",
    'rlhf_jax/algorithms/setup.py',
    "sampling=config.get('sampling', {})",
    'sampling={}',
    _tests(
      'algorithms/test_wiring', 'test_evaluators_sample_like_the_run_except_for_their_own_keys'
    ),
  ),
  Fault(
    'the held-out data set is the training data set',
    'rlhf_jax/algorithms/setup.py',
    'path=config.data.held_out_path)',
    'path=config.data.path)',
    _tests('algorithms/test_sft', 'test_evaluation_counts_every_held_out_target_once'),
  ),
  # The parts of a run.
  Fault(
    'the critic does not start from the reward model',
    'rlhf_jax/algorithms/wiring.py',
    'if start is not None:',
    'if False:',
    _tests('algorithms/test_wiring', 'test_the_critic_starts_from_the_reward_model'),
  ),
  Fault(
    'config.critic.path is ignored',
    'rlhf_jax/algorithms/wiring.py',
    'if not config.critic.path:',
    'if True:',
    _tests('algorithms/test_wiring', 'test_the_critic_starts_from_its_own_folder_if_set'),
  ),
  Fault(
    'a copy of the policy replaces the loaded reference',
    'rlhf_jax/algorithms/wiring.py',
    "frozen['reference'] = reference",
    "frozen['reference'] = jax.tree.map(jnp.copy, policy)",
    _tests('algorithms/test_wiring', 'test_the_reference_is_the_one_of_the_config'),
  ),
  Fault(
    'evaluators compare with config.reference',
    'rlhf_jax/algorithms/on_policy.py',
    'start=None if config.reference else frozen',
    'start=frozen',
    _tests(
      'algorithms/test_wiring', 'test_evaluations_start_from_the_policy_and_not_from_the_reference'
    ),
  ),
  Fault(
    'schedules ignore minibatches',
    'rlhf_jax/algorithms/wiring.py',
    'config.rl.epochs * config.rl.minibatches',
    'config.rl.epochs',
    _tests(
      'algorithms/test_wiring',
      'test_schedules_end_at_the_last_update_and_the_critic_has_its_learning_rate',
    ),
  ),
  Fault(
    "the critic's learning rate is ignored",
    'rlhf_jax/algorithms/wiring.py',
    'learning_rate=config.critic.learning_rate',
    'learning_rate=None',
    _tests(
      'algorithms/test_wiring',
      'test_schedules_end_at_the_last_update_and_the_critic_has_its_learning_rate',
    ),
  ),
  Fault(
    'an epoch counts one sample per prompt',
    'rlhf_jax/algorithms/on_policy.py',
    'count * config.sampling.samples',
    'count',
    _tests('algorithms/test_wiring', 'test_an_epoch_is_all_samples_of_all_prompts'),
  ),
  Fault(
    'truncate_at ends responses at any position',
    'rlhf_jax/algorithms/on_policy_config.py',
    'end_after=end_after,\n      **config.rl',
    'end_after=0,\n      **config.rl',
    _tests('algorithms/test_wiring', 'test_a_token_ends_responses_from_its_first_position_on'),
  ),
  Fault(
    'gradients are never clipped',
    'rlhf_jax/algorithms/setup.py',
    'clip_norm=c.clip_norm or 0.0',
    'clip_norm=0.0',
    _tests('algorithms/test_setup', 'test_an_optimizer_has_the_values_of_its_config'),
  ),
  Fault(
    'there is no weight decay',
    'rlhf_jax/algorithms/setup.py',
    'weight_decay=c.weight_decay',
    'weight_decay=0.0',
    _tests('algorithms/test_setup', 'test_an_optimizer_has_the_values_of_its_config'),
  ),
  Fault(
    "a policy's export ignores the moving average",
    'rlhf_jax/algorithms/setup.py',
    "trained = averaged(state, 'policy')",
    "trained = state.params['policy']",
    _tests('algorithms/test_setup', 'test_a_policy_is_exported_as_its_moving_average'),
  ),
  Fault(
    "a reward model's export ignores the moving average",
    'rlhf_jax/algorithms/reward_model.py',
    "def export(state, path):\n    params = setup.averaged(state, 'reward')",
    "def export(state, path):\n    params = state.params['reward']",
    _tests('algorithms/test_reward_model', 'test_a_reward_model_is_exported_as_its_moving_average'),
  ),
  # Reward models.
  Fault(
    'the same tokens are dropped in every step',
    'rlhf_jax/algorithms/reward_model.py',
    'types.step_keys(state)[1]',
    'state.key',
    _tests('algorithms/test_reward_model', 'test_each_step_loses_tokens_of_its_own'),
  ),
  Fault(
    'the same tokens are dropped in every sequence',
    'rlhf_jax/algorithms/reward_model.py',
    '1.0 - rate, mask.shape)',
    '1.0 - rate, mask.shape[-1:])[None, None]',
    _tests('algorithms/test_reward_model', 'test_each_row_loses_tokens_of_its_own'),
  ),
  Fault(
    'scores are not normalized before training',
    'rlhf_jax/algorithms/reward_model.py',
    "  params['head'] = fitted_head(params)\n",
    '',
    _tests(
      'algorithms/test_reward_model',
      'test_scores_are_normalized_before_the_first_step_and_after_the_last',
    ),
  ),
  Fault(
    'scores are normalized on the comparisons',
    'rlhf_jax/algorithms/reward_model.py',
    'if config.preference.normalize_path:',
    'if False:',
    _tests(
      'algorithms/test_reward_model',
      'test_scores_are_normalized_before_the_first_step_and_after_the_last',
    ),
  ),
  Fault(
    'reward models are always trained with an EOS',
    'rlhf_jax/algorithms/reward_model.py',
    'append_eos=config.preference.append_eos',
    'append_eos=True',
    _tests('algorithms/test_reward_model', 'test_the_first_loss_of_a_config_by_loop'),
  ),
  Fault(
    'labels are not smoothed',
    'rlhf_jax/algorithms/reward_model.py',
    'config.preference, examples=rows)',
    'config.preference, examples=rows, label_smoothing=0.0)',
    _tests('algorithms/test_reward_model', 'test_the_first_loss_of_a_config_by_loop'),
  ),
  Fault(
    'the reliability of annotators is not used',
    'rlhf_jax/algorithms/reward_model.py',
    'reliability=weights,',
    'reliability=None,',
    _tests(
      'algorithms/test_reliability', 'test_loss_and_gradient_of_a_train_step_by_a_loop[False]'
    ),
  ),
  Fault(
    'reliabilities have no prior',
    'rlhf_jax/algorithms/reliability.py',
    'return 0.5 * jnp.sum(jnp.square(of_all(params) - 1.0))',
    'return 0.0 * jnp.sum(of_all(params))',
    _tests(
      'algorithms/test_reliability', 'test_loss_and_gradient_of_a_train_step_by_a_loop[False]'
    ),
  ),
  Fault(
    'all annotators are unknown',
    'rlhf_jax/data/tokenized.py',
    'annotator[index] = numbers.get(example.annotator, -1)',
    'annotator[index] = -1',
    _tests('algorithms/test_reliability', 'test_without_the_option_the_batches_have_no_annotators'),
  ),
  Fault(
    'pairs of one prompt count as independent',
    'rlhf_jax/evaluation/reliability_stage.py',
    'intervals.rate((signs + 1) / 2, prompts)',
    'intervals.rate((signs + 1) / 2)',
    _tests(
      'evaluation/test_reliability_page',
      'test_the_paired_interval_agrees_with_the_test_of_mcnemar[15-5]',
    ),
  ),
  Fault(
    'every head learns from all comparisons',
    'rlhf_jax/algorithms/reward_model.py',
    'return valid & head_subsets(',
    'return valid | head_subsets(',
    _tests('algorithms/test_reward_model', 'test_each_head_learns_from_its_own_prompts'),
  ),
  Fault(
    'heads are normalized together',
    'rlhf_jax/algorithms/reward_model.py',
    'np.float64(np.std(scores, axis=0)), np.float64(np.mean(scores, axis=0))',
    'np.float64(np.std(scores)), np.float64(np.mean(scores))',
    _tests('algorithms/test_reward_model', 'test_a_run_with_several_heads'),
  ),
  Fault(
    'a critic starts from the first of several heads',
    'rlhf_jax/models/heads.py',
    "jnp.mean(head['kernel'], axis=1)",
    "head['kernel'][:, 0]",
    _tests('models/test_heads', 'test_several_heads_by_hand'),
  ),
  # Online RLHF.
  Fault(
    'a round that was asked is asked again',
    'rlhf_jax/feedback/rounds.py',
    'return bool(tasks)',
    'return False',
    _tests('feedback/test_rounds', 'test_a_round_is_asked_once_and_rounds_differ'),
  ),
  Fault(
    'the first policy is taken for the newest',
    'rlhf_jax/feedback/rounds.py',
    '*others, last = names',
    'last, *others = names',
    _tests('feedback/test_rounds', 'test_respondents_by_hand'),
  ),
  Fault(
    'the accuracy before a round is that of its own reward model',
    'rlhf_jax/evaluation/online.py',
    "'before': number - 1,",
    "'before': number,",
    _tests('evaluation/test_online', 'test_the_last_stage_rates_the_policies_by_hand'),
  ),
  Fault(
    'two skips of a task count as the answers of two tasks',
    'rlhf_jax/feedback/rounds.py',
    'sum(min(counts[task.id], task.overlap) for task in tasks)',
    'sum(counts[task.id] for task in tasks)',
    _tests(
      'feedback/test_rounds',
      'test_more_skips_of_a_task_than_it_wants_answers_stand_for_no_other_task',
    ),
  ),
  Fault(
    'all simulated annotators answer like the first',
    'rlhf_jax/feedback/simulate.py',
    'answer(panel, assignment.task, number, habits)',
    'answer(panel, assignment.task, 0, habits)',
    _tests(
      'feedback/test_simulate',
      'test_answers_depend_on_the_seed_the_annotator_and_the_texts_alone',
    ),
  ),
  Fault(
    'a simulated annotator repeats every answer',
    'rlhf_jax/feedback/simulate.py',
    'occasion=panel.occasion + 1',
    'occasion=panel.occasion',
    _tests('feedback/test_simulate', 'test_repeats_tell_who_is_consistent'),
  ),
  # Over-optimization.
  Fault(
    'the curve of reinforcement learning is that of best-of-n',
    'rlhf_jax/evaluation/fits.py',
    "np.log(safe) if form == 'rl' else d",
    'd',
    _tests('evaluation/test_fits', 'test_two_points_by_hand'),
  ),
  Fault(
    'scores are not relative to the initial policy',
    'rlhf_jax/evaluation/overoptimization.py',
    'point[key] - start[key]',
    'point[key]',
    _tests('evaluation/test_overoptimization', 'test_scores_are_relative_and_shifts_by_hand'),
  ),
  Fault(
    'gold models read an EOS in responses that were cut off',
    'rlhf_jax/evaluation/overoptimization.py',
    '[length < limit for length in lengths]',
    '[True for length in lengths]',
    _tests('evaluation/test_overoptimization', 'test_a_run_is_read_back'),
  ),
  Fault(
    'a list of completions loses its margin',
    'rlhf_jax/data/shapes.py',
    'ratings, margin)\n',
    'ratings)\n',
    _tests('data/test_formats', 'test_any_comparison_may_have_a_margin'),
  ),
  Fault(
    'a rated completion loses its margin',
    'rlhf_jax/data/shapes.py',
    '(rating,), margin)',
    '(rating,))',
    _tests('data/test_formats', 'test_any_comparison_may_have_a_margin'),
  ),
  # Scorers, and collected labels.
  Fault(
    'an ensemble ignores its coefficient',
    'rlhf_jax/rewards/scorers.py',
    "c.get('ensemble', 'mean'), c.get('ensemble_coef', 1.0)",
    "c.get('ensemble', 'mean'), 1.0",
    _tests('rewards/test_scorers', 'test_an_ensemble_of_reward_models[variance]'),
  ),
  Fault(
    'a critic starts from the last of several reward models',
    'rlhf_jax/rewards/scorers.py',
    'for _, model in pairs if',
    'for _, model in reversed(list(pairs)) if',
    _tests('rewards/test_scorers', 'test_an_ensemble_of_reward_models[mean]'),
  ),
  Fault(
    'the score of a response is added to its first token',
    'rlhf_jax/rewards/scorers.py',
    'last = lengths.used_lengths(response_mask)[:, None] - 1',
    'last = 0 * lengths.used_lengths(response_mask)[:, None]',
    _tests('rewards/test_scorers', 'test_scores_of_responses_are_added_to_the_last_tokens[False]'),
  ),
  Fault(
    'BERTScore takes the mean over special tokens too',
    'rlhf_jax/rewards/model_metrics.py',
    'inner = (place > 0) & (place <= count)',
    'inner = place <= count',
    _tests('rewards/test_model_metrics', 'test_greedy_match_by_a_loop'),
  ),
  Fault(
    'references of BLEU beyond the first are lost',
    'rlhf_jax/rewards/text.py',
    'most = max(map(len, groups))',
    'most = 1',
    _tests('rewards/test_text', 'test_examples_of_the_libraries'),
  ),
  Fault(
    'the weights of parts are ignored',
    'rlhf_jax/rewards/scorers.py',
    "c.parts[name].get('weight', 1.0)",
    '1.0',
    _tests('rewards/test_scorers', 'test_a_weighted_sum_from_a_config'),
  ),
  Fault(
    'a reward model ignores its max_length',
    'rlhf_jax/rewards/scorers.py',
    'max_length=max_length or model.max_length',
    'max_length=model.max_length',
    _tests('rewards/test_scorers', 'test_a_reward_model_of_another_tokenizer_reads_max_length'),
  ),
  Fault(
    'the time of an example counts from the start of its worker',
    'rlhf_jax/rewards/pool.py',
    'self.example, self.idle, self.due = example, False, _due(self._setup.scoring.seconds)',
    'self.example, self.idle = example, False',
    _tests('rewards/test_pool', 'test_a_failure_stops_the_run_and_names_the_example[hangs in C]'),
  ),
  Fault(
    'a server that is broken for a moment stops the run',
    'rlhf_jax/rewards/client.py',
    'if response.status_code == TOO_MANY_REQUESTS or response.is_server_error:',
    'if response.status_code == TOO_MANY_REQUESTS:',
    _tests(
      'rewards/test_client',
      'test_a_request_without_an_answer_is_repeated_and_no_example_is_scored_twice',
    ),
  ),
  Fault(
    'the last answer of GSM8K counts',
    'rlhf_jax/tasks/gsm8k.py',
    'match = _ANSWER.search(text)',
    'match = ([None] + list(_ANSWER.finditer(text)))[-1]',
    _tests('tasks/test_gsm8k', 'test_the_checker_is_a_reward_function'),
  ),
  Fault(
    'a run whose reward fails resumes after the batch that failed',
    'rlhf_jax/rollout/actor.py',
    '      self.iterator.set_state(position)\n',
    '',
    _tests(
      'rewards/test_host',
      'test_a_failing_reward_loses_no_step_and_the_run_resumes_as_if_it_had_not[0]',
    ),
  ),
  Fault(
    'a reward function gets the metadata of the first example',
    'rlhf_jax/rewards/host.py',
    'examples[i].metadata for i in rows',
    'examples[0].metadata for i in rows',
    _tests(
      'rewards/test_scorers', 'test_a_function_sees_each_rows_own_prompt_response_and_metadata'
    ),
  ),
  Fault(
    'scores are normalized on the second response to each prompt',
    'rlhf_jax/feedback/collect.py',
    'sampled.responses[::samples]',
    'sampled.responses[1::samples]',
    _tests(
      'feedback/test_collect', 'test_scores_are_normalized_on_the_first_response_to_each_prompt'
    ),
  ),
  Fault(
    'held-out labels are also used for training',
    'rlhf_jax/feedback/collect.py',
    "'labels.jsonl', panel.label_best(",
    "'labels.jsonl', panel.label_best(groups or ",
    _tests('feedback/test_collect', 'test_the_best_of_the_responses_that_end'),
  ),
  # The update.
  Fault(
    'a cosine schedule with warmup ends too late',
    'rlhf_jax/optim.py',
    'cosine_decay_schedule(learning_rate, decay_steps',
    'cosine_decay_schedule(learning_rate, steps',
    _tests('test_optim', 'test_a_cosine_after_a_warmup_ends_with_the_run'),
  ),
  Fault(
    'gradients are summed in their own dtype',
    'rlhf_jax/optim.py',
    'jnp.promote_types(x.dtype, jnp.float32)',
    'x.dtype',
    _tests('test_optim', 'test_gradients_of_bfloat16_add_up_in_float32'),
  ),
  Fault(
    'dual clipping applies to positive advantages',
    'rlhf_jax/losses.py',
    'jnp.where(advantages < 0, jnp.minimum',
    'jnp.where(advantages >= 0, jnp.minimum',
    _tests('test_losses', 'test_asymmetric_and_dual_clip_by_hand'),
  ),
  Fault(
    'dual clipping applies to all advantages',
    'rlhf_jax/losses.py',
    'jnp.where(advantages < 0, jnp.minimum',
    'jnp.where(True, jnp.minimum',
    _tests('test_losses', 'test_asymmetric_and_dual_clip_by_hand'),
  ),
  Fault(
    "the sampler's gap is computed after its logprobs are replaced",
    'rlhf_jax/experience.py',
    'jnp.abs(rollout.logprobs - outputs.logprobs)',
    'jnp.abs(rollout.logprobs - logprobs)',
    _BY_HAND,
  ),
  Fault(
    'explained variance omits the position of the score',
    'rlhf_jax/experience.py',
    'adv.masked_var(experience.returns - experience.values, steps)',
    'adv.masked_var(experience.returns - experience.values, mask)',
    _BY_HAND,
  ),
  Fault(
    'the variance of returns omits the position of the score',
    'rlhf_jax/experience.py',
    'variance = adv.masked_var(experience.returns, steps)',
    'variance = adv.masked_var(experience.returns, mask)',
    _BY_HAND,
  ),
  Fault(
    'the mean of values omits the position of the score',
    'rlhf_jax/algorithms/ppo.py',
    "'value/mean': step_mean(",
    "'value/mean': mean(",
    _BY_HAND,
  ),
  Fault(
    'totals of rewards per token include padding',
    'rlhf_jax/experience.py',
    ', scores, 0.0), axis=1)',
    ', scores, scores), axis=1)',
    _BY_HAND,
  ),
  Fault(
    'the sampler can draw a token of weight 0',
    'rlhf_jax/rollout/sampling.py',
    '* total[:, -1:]) & ',
    '* total[:, -1:]) | False & ',
    _tests('rollout/test_sampling', 'test_weight_zero_is_never_drawn_however_sums_are_rounded'),
  ),
  # A2C and NLPO.
  Fault(
    'the value loss of A2C is half the square',
    'rlhf_jax/algorithms/a2c.py',
    '    jnp.square(outputs.values',
    '    0.5 * jnp.square(outputs.values',
    _tests('algorithms/test_a2c', 'test_loss_gradients_and_three_steps_are_those_of_rl4lms'),
  ),
  Fault(
    'the masking policy is never refreshed',
    'rlhf_jax/algorithms/nlpo.py',
    'new.step % settings.mask_every == 0',
    'new.step < 0',
    _tests('algorithms/test_nlpo', 'test_the_masking_policy_is_a_copy_of_every_second_policy'),
  ),
  Fault(
    'the KL compares masked log-probabilities',
    'rlhf_jax/experience.py',
    'log_ratio = experience.unmasked_logprobs',
    'log_ratio = experience.logprobs',
    _tests('algorithms/test_nlpo', 'test_metrics_are_of_the_masked_ratio_and_the_raw_kl'),
  ),
  Fault(
    'masked tokens count in the sum of probabilities',
    'rlhf_jax/logprobs.py',
    '    weights = jnp.where(mask, weights, 0.0)',
    '    weights = jnp.where(mask, weights, weights)',
    _tests('rollout/test_masking', 'test_masked_distribution_of_rl4lms'),
  ),
  # ILQL.
  Fault(
    'the targets move in every step',
    'rlhf_jax/algorithms/ilql.py',
    'due = state.step % settings.target_every == 0',
    'due = True',
    _tests('algorithms/test_ilql', 'test_targets_follow_the_critic_every_second_step'),
  ),
  Fault(
    'values follow the larger of the two targets',
    'rlhf_jax/implicit_q.py',
    'jnp.minimum(*targets)',
    'jnp.maximum(*targets)',
    _tests('algorithms/test_ilql', 'test_loss_and_gradients_of_trlx[default]'),
  ),
  Fault(
    'the error of Q trains the value that it is compared with',
    'rlhf_jax/implicit_q.py',
    'jax.lax.stop_gradient(batch.rewards + settings.gamma * next_values)',
    'batch.rewards + settings.gamma * next_values',
    _tests('algorithms/test_ilql', 'test_loss_and_gradients_of_trlx[default]'),
  ),
  Fault(
    'the value after a turn is that of the next position',
    'rlhf_jax/advantages.py',
    'jnp.where(mask, jnp.arange(length)[None], length)',
    'jnp.arange(length)[None] + jnp.where(mask, 0, 0)',
    _tests('algorithms/test_ilql', 'test_loss_and_gradients_of_trlx[default]'),
  ),
  Fault(
    'the Q functions of the sampler are not scaled by beta',
    'rlhf_jax/rollout/guided.py',
    "{'kernel': self.beta * kernel}",
    "{'kernel': kernel}",
    _tests('rollout/test_guided', 'test_a_large_beta_chooses_the_highest_q'),
  ),
  # Checkpoints, forks, pipelines.
  Fault(
    'an unreadable checkpoint changes the position of iterators',
    'rlhf_jax/checkpoint.py',
    'it.set_state(first[name])',
    'pass',
    _tests('test_checkpoint', 'test_iterators_stay_where_they_were_if_nothing_is_readable'),
  ),
  Fault(
    'states of iterators are not copied',
    'rlhf_jax/checkpoint.py',
    'copy.deepcopy(it.get_state())',
    'it.get_state()',
    _tests('test_checkpoint', 'test_a_saved_position_does_not_change_with_later_batches'),
  ),
  Fault(
    'a fork ignores state that its config sets',
    'rlhf_jax/loop.py',
    'extra=state.extra | new_extra',
    'extra=state.extra',
    _tests('test_identity', 'test_a_fork_follows_its_config'),
  ),
  Fault(
    'a fork keeps the random key of the other seed',
    'rlhf_jax/loop.py',
    'key = state.key if new_key is None else new_key',
    'key = state.key',
    _tests('test_identity', 'test_a_fork_with_another_seed_draws_from_its_keys'),
  ),
  Fault(
    'a fork is not saved before its first step',
    'rlhf_jax/loop.py',
    'if forked:  #',
    'if False:  #',
    _tests('test_checkpoint', 'test_optimizer_settings_may_change_in_a_fork'),
  ),
  Fault(
    'a resumed run repeats lines of metrics',
    'rlhf_jax/loop.py',
    'resume_step=step',
    'resume_step=10**9',
    _tests(
      'test_resume',
      'test_stopped_runs_end_like_uninterrupted_ones[rlhf_jax.algorithms.reward_model-stops1]',
    ),
  ),
  Fault(
    'only one checkpoint is kept',
    'rlhf_jax/loop.py',
    'keep=config.keep_checkpoints',
    'keep=1',
    _tests('test_loop', 'test_a_folder_records_its_config_and_starts'),
  ),
  Fault(
    'a fork copies stages after the first that differs',
    'rlhf_jax/pipeline.py',
    '      break',
    '      continue',
    _tests('test_pipeline', 'test_a_fork_copies_the_finished_stages_up_to_the_first_that_differs'),
  ),
  Fault(
    "a stage's own seed is replaced",
    'rlhf_jax/pipeline.py',
    "if 'seed' in stage and stage.seed is None",
    "if 'seed' in stage",
    _tests('test_pipeline', 'test_placeholders_and_seeds'),
  ),
  Fault(
    'a finished stage may become longer',
    'rlhf_jax/pipeline.py',
    ' and not (done and key in identity.LENGTH_KEYS)',
    '',
    _tests(
      'test_pipeline', 'test_a_finished_stage_may_not_become_longer_and_an_unfinished_one_may'
    ),
  ),
  # Rollouts sampled ahead.
  Fault(
    'a rollout sampled ahead has the random key of the one before',
    'rlhf_jax/algorithms/on_policy.py',
    'rollout_key(state.step + 1)',
    'rollout_key(state.step)',
    _tests('algorithms/test_staleness', 'test_without_updates_it_changes_nothing'),
  ),
  Fault(
    'a resumed run forgets the rollout sampled ahead',
    'rlhf_jax/rollout/actor.py',
    "self._ahead = rollout, np.asarray(state['index'])",
    'self._ahead = None',
    _tests('algorithms/test_staleness', 'test_a_saved_rollout_is_the_same_after_json'),
  ),
  Fault(
    'importance weights have no cap',
    'rlhf_jax/advantages.py',
    'jnp.minimum(jnp.exp(logprobs - sampler_logprobs), cap)',
    'jnp.exp(logprobs - sampler_logprobs)',
    _tests(
      'algorithms/test_staleness',
      'test_each_token_has_its_importance_weight[rlhf_jax.algorithms.ppo]',
    ),
  ),
  # Rejection sampling and best-of-n.
  Fault(
    'rejection sampling trains on all responses',
    'rlhf_jax/algorithms/rejection_sampling.py',
    'keep = mask & kept[:, None]',
    'keep = mask',
    _tests('algorithms/test_rejection_sampling', 'test_the_loss_is_that_of_the_kept_tokens[{}]'),
  ),
  Fault(
    'the best-of-n stage writes the worst responses',
    'rlhf_jax/evaluation/best_of_n_stage.py',
    "np.argsort(-row, kind='stable')",
    "np.argsort(row, kind='stable')",
    _tests('evaluation/test_best_of_n_stage', 'test_the_best_response_to_each_prompt_is_selected'),
  ),
  # Streams and dialogues.
  Fault(
    'a streamed response ignores its seed',
    'rlhf_jax/rollout/streaming.py',
    'jax.random.fold_in(jax.random.key(seed), 0)',
    'jax.random.fold_in(jax.random.key(0 * seed), 0)',
    _tests('rollout/test_streamed_sampling', 'test_tokens_are_those_of_the_prompt_alone'),
  ),
  Fault(
    'the less harmful answer continues an attack',
    'rlhf_jax/feedback/dialogues.py',
    "return first if better == (dialogue.mode == 'helpful') else second",
    'return first if better else second',
    _tests(
      'feedback/test_dialogues',
      'test_the_more_harmful_answer_continues_an_attack_and_is_rejected[red_team]',
    ),
  ),
  Fault(
    'the first named policy is always on the left side',
    'rlhf_jax/feedback/page/chat.py',
    'names = _random.sample(names, 2) if',
    'names = names[:2] if',
    _tests('feedback/test_chat_pages', 'test_no_side_tells_which_policy_answers'),
  ),
  Fault(
    'the faster policy of a chat writes first',
    'rlhf_jax/feedback/page/chat.py',
    'if not all(waiting[side] or side in ended for side in order):',
    'if not any(waiting):',
    _tests('feedback/test_chat_pages', 'test_both_sides_have_one_pace'),
  ),
  # Mixtures, conversations and experts.
  Fault(
    'the sources of a mixture share one count of draws',
    'rlhf_jax/data/mixtures.py',
    'counts = drawn[np.arange(BLOCK), sources] - 1 + self._before[block][sources]',
    'counts = np.arange(BLOCK) + self._before[block].sum()',
    _tests('data/test_mixtures', 'test_every_source_has_epochs_of_its_own'),
  ),
  Fault(
    'weights of a mixture are ignored',
    'rlhf_jax/data/mixtures.py',
    'np.cumsum(weights / np.sum(weights))[:-1]',
    'np.cumsum(np.ones(len(weights)) / len(weights))[:-1]',
    _tests('data/test_mixtures', 'test_sources_are_drawn_independently_by_their_weights'),
  ),
  Fault(
    'the messages between answers are learned too',
    'rlhf_jax/data/tokenized.py',
    'np.full(len(part), n % 2 == 0)',
    'np.full(len(part), True)',
    _tests('data/test_conversations', 'test_targets_are_the_tokens_of_answers'),
  ),
  Fault(
    'merged adapters lose their scale',
    'rlhf_jax/models/lora.py',
    'weight * lora.find(path)[1] * b',
    'weight * b',
    _tests('test_experts', 'test_the_command_merges_by_weight'),
  ),
  # Ratings and agreement.
  Fault(
    'a bootstrap resamples single games, not tasks',
    'rlhf_jax/feedback/bradley_terry.py',
    'group=np.array([tasks.setdefault(b.task_id, len(tasks)) for b in battles], int),',
    'group=np.arange(len(battles)),',
    _tests('feedback/test_bradley_terry', 'test_intervals_are_those_of_resampled_tasks'),
  ),
  Fault(
    'the difference of lengths is centred, so that ratings depend on sides',
    'rlhf_jax/feedback/bradley_terry.py',
    'return x / scale',
    'return (x - x.mean()) / scale',
    _tests('feedback/test_bradley_terry', 'test_style_control_does_not_depend_on_sides[davidson]'),
  ),
  Fault(
    'an item with one vote counts as agreement',
    'rlhf_jax/feedback/agreement.py',
    'kept = counts[counts.sum(axis=1) >= 2]',
    'kept = counts[counts.sum(axis=1) >= 1]',
    _tests('feedback/test_agreement', 'test_agreement_with_missing_votes_by_hand'),
  ),
  Fault(
    'gold questions count as votes',
    'rlhf_jax/feedback/votes.py',
    'if task.kind == wanted and reading.is_ordinary(task) and not answers.skipped(item.answer):',
    'if task.kind == wanted and not answers.skipped(item.answer):',
    _tests('feedback/test_votes', 'test_votes_of_pairs'),
  ),
  # Red teaming.
  Fault(
    'the diversity bonus counts the attack itself among the others',
    'rlhf_jax/feedback/attacks.py',
    'sum(have[gram] - 1 for gram in own)',
    'sum(have[gram] for gram in own)',
    _tests('feedback/test_attacks', 'test_novelty_by_hand'),
  ),
  Fault(
    'examples of a few-shot attacker are drawn without their scores',
    'rlhf_jax/feedback/attacks.py',
    '-(logits + random.gumbel(size=len(logits)))',
    '-random.gumbel(size=len(logits))',
    _tests('feedback/test_attacks', 'test_examples_are_drawn_by_their_weights_and_never_twice'),
  ),
  Fault(
    'the reward of an attacker lets the target answer all lines of its text',
    'rlhf_jax/feedback/targets.py',
    '[attacks_lib.of_response(prefix, response) for response in responses]',
    '[prefix + response for response in responses]',
    _tests('feedback/test_redteam', 'test_the_reward_of_an_attacker_is_the_harm_of_known_answers'),
  ),
  Fault(
    'attackers of all rounds write the same attacks',
    'rlhf_jax/feedback/redteam.py',
    'repr((seed, folder.name))',
    'repr(seed)',
    _tests('feedback/test_redteam', 'test_attacks_and_the_answers_to_them_are_written'),
  ),
  Fault(
    'attacks that the target was trained on count as new',
    'rlhf_jax/evaluation/redteam_page.py',
    " if record['prompt'] not in one.trained]",
    ']',
    _tests('evaluation/test_redteam_page', 'test_figures_of_attackers_and_targets'),
  ),
  # Human feedback.
  Fault(
    'a task that others are answering counts as open',
    'rlhf_jax/feedback/leasing.py',
    'task.judged + leased.scalar_subquery() < task.overlap',
    'task.judged < task.overlap',
    _tests(
      'feedback/test_assignment', 'test_a_task_goes_to_as_many_annotators_as_it_wants[sqlite]'
    ),
  ),
  Fault(
    'writes to a project do not wait for one another',
    'rlhf_jax/feedback/database.py',
    'if project_id is not None:',
    'if False:',
    _tests('feedback/test_concurrency', 'test_threads_and_processes[postgresql]'),
  ),
  Fault(
    'the expired lease of a task keeps others from it',
    'rlhf_jax/feedback/leasing.py',
    '_OTHERS.annotator_id != annotator_id, _OTHERS.expires > now',
    '_OTHERS.annotator_id != annotator_id',
    _tests('feedback/test_assignment', 'test_leases_expire[sqlite]'),
  ),
  Fault(
    'a late answer is stored although others have the task',
    'rlhf_jax/feedback/judging.py',
    'if lease.expires <= now and not leasing.has_room(',
    'if False and not leasing.has_room(',
    _tests('feedback/test_assignment', 'test_leases_expire[sqlite]'),
  ),
  Fault(
    'a skip that is undone assigns a task that others have answered',
    'rlhf_jax/feedback/judging.py',
    'if leasing.has_room(session, asked, annotator.id, now):',
    'if True:',
    _tests('feedback/test_assignment', 'test_a_skip_gives_the_task_to_another_annotator[sqlite]'),
  ),
  Fault(
    'an answer that is undone still counts for its task',
    'rlhf_jax/feedback/judging.py',
    'asked.judged -= not answers.skipped(undone.answer)',
    'asked.judged -= 0',
    _tests('feedback/test_assignment', 'test_an_undo_is_a_row_and_the_task_comes_back[sqlite]'),
  ),
  Fault(
    'an undo takes back an answer in another project',
    'rlhf_jax/feedback/judging.py',
    'task.project_id == project.id,\n    row.annotator_id == annotator.id,',
    'row.annotator_id == annotator.id,',
    _tests('feedback/test_assignment', 'test_an_undo_is_a_row_and_the_task_comes_back[sqlite]'),
  ),
  Fault(
    'imports into two projects add the same annotators without waiting',
    'rlhf_jax/feedback/transfer.py',
    'database_lib.lock_annotators(self._session)',
    'pass',
    _tests('feedback/test_concurrency', 'test_imports_at_once[postgresql-pq-names3-added3]'),
  ),
  Fault(
    'a record that is in a file twice is imported once',
    'rlhf_jax/feedback/transfer.py',
    'seen[key] = seen.get(key, 0) + 1',
    'seen[key] = 1',
    _tests('feedback/test_transfer', 'test_a_round_trip_is_exact[pairs]'),
  ),
  Fault(
    'a file that was imported for one round is not imported for another',
    'rlhf_jax/feedback/transfer.py',
    '[project.id, round, name, dataclasses.asdict(labelled)]',
    '[project.id, name, dataclasses.asdict(labelled)]',
    _tests('feedback/test_transfer', 'test_a_round_trip_is_exact[pairs]'),
  ),
  Fault(
    'a run that resumes reads other judgements than before',
    'rlhf_jax/feedback/source.py',
    'if path in recorded:',
    'if path is recorded:',
    _tests('feedback/test_source', 'test_a_run_refuses_a_store_that_lost_judgements'),
  ),
  Fault(
    'a form to undo that is sent twice undoes two answers',
    'rlhf_jax/feedback/judging.py',
    'undone is None or judgement_id not in (None, undone.id)',
    'undone is None',
    _tests('feedback/test_page_undo', 'test_an_undo_that_is_sent_twice_undoes_one'),
  ),
  Fault(
    'a reward model learns that harm is good',
    'rlhf_jax/feedback/reading.py',
    ' or _rates_attack(item.task)',
    '',
    _tests(
      'feedback/test_dialogues',
      'test_the_more_harmful_answer_continues_an_attack_and_is_rejected[red_team]',
    ),
  ),
  # The labelling page.
  Fault(
    'an answer is stored for the other one of a pair',
    'rlhf_jax/feedback/page/forms.py',
    "shown['ab'.index(match[1])]",
    "shown['ba'.index(match[1])]",
    _tests(
      'feedback/test_page',
      'test_a_comparison_is_stored_for_the_answer_that_was_displayed[good]',
    ),
  ),
  Fault(
    'a form needs no token of its lease',
    'rlhf_jax/feedback/page/annotate.py',
    'schema.Lease.annotator_id == user.id,\n        schema.Lease.token == token,',
    'schema.Lease.annotator_id == user.id,',
    _tests('feedback/test_page', 'test_an_old_form_does_not_answer_another_task'),
  ),
  Fault(
    'the CSRF token of a request is not compared',
    'rlhf_jax/feedback/page/auth.py',
    'not equal(given, expected)',
    'not given',
    _tests('feedback/test_page_security', 'test_a_post_needs_the_token_of_the_session[wrong]'),
  ),
  Fault(
    'the token of the sign-in form allows every request',
    'rlhf_jax/feedback/page/auth.py',
    'not equal(given, expected)',
    'given not in (expected, form_token(request))',
    _tests(
      'feedback/test_page_security',
      'test_a_post_needs_the_token_of_the_session[of the sign-in form]',
    ),
  ),
  Fault(
    'forms of other sites are accepted',
    'rlhf_jax/feedback/page/auth.py',
    'if not same or origin.scheme not in',
    'if origin.scheme not in',
    _tests('feedback/test_page_security', 'test_a_post_from_another_site_is_refused[headers4-403]'),
  ),
  Fault(
    'a session in use never ends',
    'rlhf_jax/feedback/page/auth.py',
    'end = session.created + settings.session_seconds',
    'end = now + settings.session_seconds',
    _tests('feedback/test_page_security', 'test_sessions_expire'),
  ),
  Fault(
    'a new password leaves other sessions open',
    'rlhf_jax/feedback/accounts.py',
    '    session.execute(ended)\n',
    '',
    _tests('feedback/test_page_security', 'test_a_password_is_set_and_other_sessions_end'),
  ),
  Fault(
    'annotators see the pages of owners',
    'rlhf_jax/feedback/page/auth.py',
    "if annotator.role != 'owner':",
    'if annotator.disabled:',
    _tests('feedback/test_owner_pages', 'test_only_owners_see_them[/annotators]'),
  ),
  Fault(
    'the arrow keys choose the other answer',
    'rlhf_jax/feedback/page/static/app.js',
    '{ ArrowLeft: -1, ArrowRight: 1 }',
    '{ ArrowLeft: 1, ArrowRight: -1 }',
    _tests('feedback/browser/test_browser_labelling', 'test_twenty_pairs_by_keyboard_alone'),
  ),
  Fault(
    'answers are not escaped',
    'rlhf_jax/feedback/page/templates/task_parts.html',
    '{{ answer.strip() }}',
    '{{ answer.strip()|safe }}',
    _tests(
      'feedback/browser/test_browser_injection',
      'test_stored_payloads_are_text_on_the_pages_of_annotators',
    ),
  ),
)
