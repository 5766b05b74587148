"""The first version of the tables."""

from alembic import op
import sqlalchemy as sa

revision = '0001'
down_revision = None


def upgrade():
  """Makes all tables."""
  _make_people()
  _make_questions()
  _make_answers()


def _make_people():
  op.create_table(
    'projects',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('name', sa.String, nullable=False),
    sa.Column('instructions', sa.String, nullable=False),
    sa.Column('settings', sa.JSON, nullable=False),
    sa.Column('created', sa.Double, nullable=False),
    sa.PrimaryKeyConstraint('id', name='pk_projects'),
    sa.UniqueConstraint('name', name='uq_projects_name'),
  )
  op.create_table(
    'annotators',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('name', sa.String, nullable=False),
    sa.Column('role', sa.String, nullable=False),
    sa.Column('password_hash', sa.String),
    sa.Column('link_hash', sa.String),
    sa.Column('simulated', sa.Boolean, nullable=False),
    sa.Column('disabled', sa.Boolean, nullable=False),
    sa.Column('created', sa.Double, nullable=False),
    sa.PrimaryKeyConstraint('id', name='pk_annotators'),
    sa.UniqueConstraint('name', name='uq_annotators_name'),
    sa.UniqueConstraint('link_hash', name='uq_annotators_link_hash'),
  )
  op.create_table(
    'sessions',
    sa.Column('token_hash', sa.String, nullable=False),
    sa.Column('annotator_id', sa.Integer, nullable=False),
    sa.Column('csrf', sa.String, nullable=False),
    sa.Column('created', sa.Double, nullable=False),
    sa.Column('expires', sa.Double, nullable=False),
    sa.PrimaryKeyConstraint('token_hash', name='pk_sessions'),
    _refers('sessions', 'annotator_id', 'annotators'),
  )
  op.create_index('ix_sessions_annotator_id', 'sessions', ['annotator_id'])
  op.create_table(
    'dialogues',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('project_id', sa.Integer, nullable=False),
    sa.Column('annotator_id', sa.Integer, nullable=False),
    sa.Column('mode', sa.String, nullable=False),
    sa.Column('created', sa.Double, nullable=False),
    sa.Column('closed', sa.Double),
    sa.PrimaryKeyConstraint('id', name='pk_dialogues'),
    _refers('dialogues', 'project_id', 'projects'),
    _refers('dialogues', 'annotator_id', 'annotators'),
  )
  op.create_index('ix_dialogues_project_id', 'dialogues', ['project_id'])
  op.create_index('ix_dialogues_annotator_id', 'dialogues', ['annotator_id'])


def _make_questions():
  op.create_table(
    'prompts',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('project_id', sa.Integer, nullable=False),
    sa.Column('dialogue_id', sa.Integer),
    sa.Column('text', sa.String, nullable=False),
    sa.Column('messages', sa.JSON),
    sa.Column('digest', sa.String, nullable=False),
    sa.PrimaryKeyConstraint('id', name='pk_prompts'),
    sa.UniqueConstraint('project_id', 'digest', name='uq_prompts_project_id_digest'),
    _refers('prompts', 'project_id', 'projects'),
    _refers('prompts', 'dialogue_id', 'dialogues'),
  )
  op.create_index('ix_prompts_dialogue_id', 'prompts', ['dialogue_id'])
  op.create_table(
    'completions',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('prompt_id', sa.Integer, nullable=False),
    sa.Column('text', sa.String, nullable=False),
    sa.Column('policy', sa.String, nullable=False),
    sa.Column('checkpoint', sa.String),
    sa.Column('sampling', sa.JSON),
    sa.Column('created', sa.Double, nullable=False),
    sa.PrimaryKeyConstraint('id', name='pk_completions'),
    _refers('completions', 'prompt_id', 'prompts'),
  )
  op.create_index('ix_completions_prompt_id', 'completions', ['prompt_id'])
  op.create_table(
    'tasks',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('project_id', sa.Integer, nullable=False),
    sa.Column('kind', sa.String, nullable=False),
    sa.Column('prompt_id', sa.Integer, nullable=False),
    sa.Column('completion_ids', sa.JSON, nullable=False),
    sa.Column('policies', sa.String, nullable=False),
    sa.Column('overlap', sa.Integer, nullable=False),
    sa.Column('priority', sa.Double, nullable=False),
    sa.Column('shuffle', sa.Double, nullable=False),
    sa.Column('round', sa.Integer, nullable=False),
    sa.Column('gold', sa.JSON),
    sa.Column('annotator_id', sa.Integer),
    sa.Column('repeats_task_id', sa.Integer),
    sa.Column('judged', sa.Integer, nullable=False),
    sa.Column('created', sa.Double, nullable=False),
    sa.PrimaryKeyConstraint('id', name='pk_tasks'),
    _refers('tasks', 'project_id', 'projects'),
    _refers('tasks', 'prompt_id', 'prompts'),
    _refers('tasks', 'annotator_id', 'annotators'),
    _refers('tasks', 'repeats_task_id', 'tasks'),
  )
  op.create_index('ix_tasks_annotator_id', 'tasks', ['annotator_id'])
  op.create_index('ix_tasks_prompt_id', 'tasks', ['prompt_id'])
  op.create_index(
    'ix_tasks_open',
    'tasks',
    ['project_id', sa.text('priority DESC'), 'shuffle'],
    sqlite_where=sa.text('judged < overlap'),
    postgresql_where=sa.text('judged < overlap'),
  )
  op.create_index('ix_tasks_policies', 'tasks', ['project_id', 'policies', 'judged'])


def _make_answers():
  op.create_table(
    'leases',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('task_id', sa.Integer, nullable=False),
    sa.Column('annotator_id', sa.Integer, nullable=False),
    sa.Column('shown', sa.JSON, nullable=False),
    sa.Column('token', sa.String, nullable=False),
    sa.Column('created', sa.Double, nullable=False),
    sa.Column('expires', sa.Double, nullable=False),
    sa.PrimaryKeyConstraint('id', name='pk_leases'),
    sa.UniqueConstraint('task_id', 'annotator_id', name='uq_leases_task_id_annotator_id'),
    _refers('leases', 'task_id', 'tasks'),
    _refers('leases', 'annotator_id', 'annotators'),
    sqlite_autoincrement=True,
  )
  op.create_index('ix_leases_annotator_id', 'leases', ['annotator_id'])
  op.create_table(
    'judgements',
    sa.Column('id', sa.Integer, nullable=False),
    sa.Column('task_id', sa.Integer, nullable=False),
    sa.Column('annotator_id', sa.Integer, nullable=False),
    sa.Column('answer', sa.JSON, nullable=False),
    sa.Column('reason', sa.String, nullable=False),
    sa.Column('flags', sa.JSON, nullable=False),
    sa.Column('shown', sa.JSON, nullable=False),
    sa.Column('seconds', sa.Double, nullable=False),
    sa.Column('created', sa.Double, nullable=False),
    sa.Column('undoes', sa.Integer),
    sa.Column('token', sa.String, nullable=False),
    sa.PrimaryKeyConstraint('id', name='pk_judgements'),
    sa.UniqueConstraint('token', name='uq_judgements_token'),
    sa.UniqueConstraint('undoes', name='uq_judgements_undoes'),
    _refers('judgements', 'task_id', 'tasks'),
    _refers('judgements', 'annotator_id', 'annotators'),
    _refers('judgements', 'undoes', 'judgements'),
  )
  op.create_index('ix_judgements_task_id', 'judgements', ['task_id'])
  op.create_index('ix_judgements_annotator_id_task_id', 'judgements', ['annotator_id', 'task_id'])


def _refers(table, column, other):
  return sa.ForeignKeyConstraint([column], [f'{other}.id'], name=f'fk_{table}_{column}')
