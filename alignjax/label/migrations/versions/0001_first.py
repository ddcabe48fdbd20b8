"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None


def upgrade() -> None:
  op.create_table(
    'attempts',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('name', sa.String(length=100), nullable=False),
    sa.Column('address', sa.String(length=100), nullable=False),
    sa.Column('at', sa.Float(), nullable=False),
    sa.PrimaryKeyConstraint('id'),
  )
  op.create_index('attempts_at', 'attempts', ['at'], unique=False)
  op.create_table(
    'people',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('name', sa.String(length=100), nullable=False),
    sa.Column('role', sa.String(length=20), nullable=False),
    sa.Column('pool', sa.String(length=20), nullable=False),
    sa.Column('password', sa.String(length=200), nullable=False),
    sa.Column('epoch', sa.Integer(), nullable=False),
    sa.Column('active', sa.Boolean(), nullable=False),
    sa.Column('created', sa.Float(), nullable=False),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('name'),
  )
  op.create_table(
    'settings',
    sa.Column('name', sa.String(length=40), nullable=False),
    sa.Column('value', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('name'),
  )
  op.create_table(
    'tasks',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=False),
    sa.Column('kind', sa.String(length=20), nullable=False),
    sa.Column('pool', sa.String(length=20), nullable=False),
    sa.Column('overlap', sa.Integer(), nullable=False),
    sa.Column('gold_rate', sa.Float(), nullable=False),
    sa.Column('ratings', sa.Boolean(), nullable=False),
    sa.Column('instructions', sa.Text(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('created', sa.Float(), nullable=False),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('name'),
  )
  op.create_table(
    'instructions',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('task_id', sa.Integer(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('markdown', sa.Text(), nullable=False),
    sa.Column('at', sa.Float(), nullable=False),
    sa.ForeignKeyConstraint(['task_id'], ['tasks.id']),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('task_id', 'version'),
  )
  op.create_table(
    'invites',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('digest', sa.String(length=64), nullable=False),
    sa.Column('role', sa.String(length=20), nullable=False),
    sa.Column('pool', sa.String(length=20), nullable=False),
    sa.Column('expires', sa.Float(), nullable=False),
    sa.Column('person_id', sa.Integer(), nullable=True),
    sa.ForeignKeyConstraint(['person_id'], ['people.id']),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('digest'),
  )
  op.create_table(
    'items',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('task_id', sa.Integer(), nullable=False),
    sa.Column('key', sa.String(length=64), nullable=False),
    sa.Column('prompt', sa.JSON(), nullable=False),
    sa.Column('use_case', sa.String(length=200), nullable=True),
    sa.Column('responses', sa.JSON(), nullable=False),
    sa.Column('extra', sa.JSON(), nullable=False),
    sa.Column('gold', sa.JSON(), nullable=True),
    sa.Column('is_gold', sa.Boolean(), nullable=False),
    sa.Column('priority', sa.Float(), nullable=False),
    sa.Column('overlap', sa.Integer(), nullable=True),
    sa.Column('hidden', sa.String(length=200), nullable=True),
    sa.Column('answers', sa.Integer(), nullable=False),
    sa.Column('created', sa.Float(), nullable=False),
    sa.ForeignKeyConstraint(['task_id'], ['tasks.id']),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('task_id', 'key'),
  )
  op.create_index(
    'items_open',
    'items',
    ['task_id', 'is_gold', 'hidden', 'priority', 'id', 'answers', 'overlap'],
    unique=False,
  )
  op.create_table(
    'answers',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('item_id', sa.Integer(), nullable=False),
    sa.Column('person_id', sa.Integer(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('current', sa.Boolean(), nullable=False),
    sa.Column('status', sa.String(length=20), nullable=False),
    sa.Column('payload', sa.JSON(), nullable=False),
    sa.Column('shown', sa.JSON(), nullable=False),
    sa.Column('instructions_version', sa.Integer(), nullable=False),
    sa.Column('elapsed', sa.Float(), nullable=False),
    sa.Column('active', sa.Float(), nullable=True),
    sa.Column('at', sa.Float(), nullable=False),
    sa.ForeignKeyConstraint(['item_id'], ['items.id']),
    sa.ForeignKeyConstraint(['person_id'], ['people.id']),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('item_id', 'person_id', 'version'),
  )
  op.create_index('answers_person', 'answers', ['person_id', 'current'], unique=False)
  op.create_table(
    'drafts',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('item_id', sa.Integer(), nullable=False),
    sa.Column('person_id', sa.Integer(), nullable=False),
    sa.Column('payload', sa.JSON(), nullable=False),
    sa.Column('at', sa.Float(), nullable=False),
    sa.ForeignKeyConstraint(['item_id'], ['items.id']),
    sa.ForeignKeyConstraint(['person_id'], ['people.id']),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('item_id', 'person_id'),
  )
  op.create_table(
    'events',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('at', sa.Float(), nullable=False),
    sa.Column('kind', sa.String(length=40), nullable=False),
    sa.Column('person_id', sa.Integer(), nullable=True),
    sa.Column('item_id', sa.Integer(), nullable=True),
    sa.Column('details', sa.JSON(), nullable=False),
    sa.ForeignKeyConstraint(['item_id'], ['items.id']),
    sa.ForeignKeyConstraint(['person_id'], ['people.id']),
    sa.PrimaryKeyConstraint('id'),
  )
  op.create_index('events_at', 'events', ['at'], unique=False)
  op.create_table(
    'leases',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('item_id', sa.Integer(), nullable=False),
    sa.Column('person_id', sa.Integer(), nullable=False),
    sa.Column('shown', sa.JSON(), nullable=False),
    sa.Column('since', sa.Float(), nullable=False),
    sa.Column('expires', sa.Float(), nullable=False),
    sa.ForeignKeyConstraint(['item_id'], ['items.id']),
    sa.ForeignKeyConstraint(['person_id'], ['people.id']),
    sa.PrimaryKeyConstraint('id'),
    sa.UniqueConstraint('item_id', 'person_id'),
  )
  op.create_index('leases_person', 'leases', ['person_id'], unique=False)
  op.create_table(
    'reviews',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('answer_id', sa.Integer(), nullable=False),
    sa.Column('person_id', sa.Integer(), nullable=False),
    sa.Column('score', sa.Integer(), nullable=False),
    sa.Column('at', sa.Float(), nullable=False),
    sa.ForeignKeyConstraint(['answer_id'], ['answers.id']),
    sa.ForeignKeyConstraint(['person_id'], ['people.id']),
    sa.PrimaryKeyConstraint('id'),
  )
