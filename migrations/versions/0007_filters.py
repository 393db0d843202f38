"""Lists are filtered within their index"""

from alembic import op

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None

_FILTERS = ['status', 'type', 'region']
_INDEXES = {'newest_of_owner': ['owner', 'created_at', 'id'], 'newest': ['created_at', 'id']}


def upgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        for name, columns in _INDEXES.items():
            batch_op.drop_index(name)
            batch_op.create_index(name, [*columns, *_FILTERS], unique=False)


def downgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        for name, columns in _INDEXES.items():
            batch_op.drop_index(name)
            batch_op.create_index(name, columns, unique=False)
